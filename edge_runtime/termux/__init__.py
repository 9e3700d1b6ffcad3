"""A life on a phone: services for termux-services, a script for Termux:Boot, and the command that installs them.

The scripts are package data of this package, because a phone installs a wheel and has no checkout.
"""
