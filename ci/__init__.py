"""Scripts that set up, check, measure and draw; run them from the root: `python -m ci.ROOM.NAME`."""
