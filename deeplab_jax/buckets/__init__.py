"""Runs, models and data in buckets: `gs://` (extra `gcs`) and `s3://` (extra `s3`).

A run in a bucket is a local folder that is mirrored there, and readers copy what they need to a
local cache first. So all other rooms work with local files.
"""
