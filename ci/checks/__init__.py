"""What is right or wrong: exit status 1 says so."""
