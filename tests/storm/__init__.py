"""Tests: storm."""
