"""`vllm-dwdp doctor`: looks at what ranks need of this machine, a line each, with a remedy where something is missing.

Readings are taken in child processes that have a limit of time, since a driver may hang and an import may crash; checks are
pure functions from readings to lines.
"""
