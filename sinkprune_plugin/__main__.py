"""`python -m sinkprune_plugin`, also for launchers that start a module in several processes."""

from sinkprune_plugin.cli import main

main()
