"""Tokens that travel: requests between ranks, and the thread of an owner that answers them."""
