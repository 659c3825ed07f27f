"""Shared by the sessions of noxfile.py; not part of any package."""
