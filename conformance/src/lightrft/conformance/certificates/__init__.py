"""Certificates of strategies and engines."""
