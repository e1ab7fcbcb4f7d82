"""Where attention goes: capture of attention mass, detection of sinks, and their movement over timesteps."""

from sinkprune_plugin.sinks.attention_interface import intercept_attention_interface
from sinkprune_plugin.sinks.attention_mass import AttentionCapture, capture_attention_mass, report_attention
from sinkprune_plugin.sinks.column_sums import attention_column_sums
from sinkprune_plugin.sinks.detection import sink_threshold, soft_sink_mask, transient_sink_mask

__all__ = [
    "AttentionCapture",
    "attention_column_sums",
    "capture_attention_mass",
    "intercept_attention_interface",
    "report_attention",
    "sink_threshold",
    "soft_sink_mask",
    "transient_sink_mask",
]
