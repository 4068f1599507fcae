"""Real servers, faults and virtual time for tests."""

from ._cluster import Cluster as Cluster

__all__ = ("Cluster",)
