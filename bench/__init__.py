"""Measurements of speed, latency, memory and start: `make bench`.  Nothing is asserted."""
