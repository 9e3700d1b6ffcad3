"""All tests of nestling; `python -m tests` lists the ways to run them."""
