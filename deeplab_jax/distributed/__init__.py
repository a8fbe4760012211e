"""Devices as a mesh, several processes, preemption."""
