"""Transports: how a rank's slabs reach its peers. base.py says what one is; one file or a few per transport."""
