"""Pictures and pages made from what a run has written."""

from i3lm.reports.loss_plot import plot_loss

__all__ = ["plot_loss"]
