"""The pictures of `docs/guide.md`; `docs/draw.py` is their command."""
