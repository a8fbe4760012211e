"""Buckets on this machine, for all tests in this folder."""

from bucket_servers import bucket, gs_bucket, impatient, own_server, server, servers  # noqa: F401
