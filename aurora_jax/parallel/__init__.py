"""Mesh and sharding rules, expert exchange, multi-host jobs."""
