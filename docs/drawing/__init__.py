"""The pictures of `docs/guide.md` and `docs/architecture.md`; `docs/draw.py` is their command."""
