"""Subcommands of `sinkprune`, one module each; cli.py holds their options."""
