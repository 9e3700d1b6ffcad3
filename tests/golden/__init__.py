"""Bytes that must never change, and bytes that must never get in."""
