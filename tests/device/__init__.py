"""Tests: device."""
