"""Mesh and sharding rules, expert exchange, hosts, ahead-of-time compile."""
