"""Where attention goes: capture of attention mass, detection of sinks, and their movement over timesteps."""

from sinkprune_plugin.sinks.attention_interface import intercept_attention_interface
from sinkprune_plugin.sinks.attention_mass import AttentionCapture, capture_attention_mass, report_attention
from sinkprune_plugin.sinks.column_sums import attention_column_sums
from sinkprune_plugin.sinks.detection import sink_threshold, soft_sink_mask, transient_sink_mask
from sinkprune_plugin.sinks.dynamics import SinkDynamics, sink_dynamics
from sinkprune_plugin.sinks.observe import SinkObservation, SinkSettings, find_spec, observe_sinks
from sinkprune_plugin.sinks.report import SinkReport, print_sink_report, sink_report

__all__ = [
    "AttentionCapture",
    "SinkDynamics",
    "SinkObservation",
    "SinkReport",
    "SinkSettings",
    "attention_column_sums",
    "capture_attention_mass",
    "find_spec",
    "intercept_attention_interface",
    "observe_sinks",
    "print_sink_report",
    "report_attention",
    "sink_dynamics",
    "sink_report",
    "sink_threshold",
    "soft_sink_mask",
    "transient_sink_mask",
]
