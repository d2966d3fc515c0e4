"""After deployment: whether rows still come from where the certified ones came."""

from netweight.monitor.alerts import Webhook
from netweight.monitor.log import lines, monitors, replay
from netweight.monitor.watch import Alert, Monitor, Record

__all__ = ["Alert", "Monitor", "Record", "Webhook", "lines", "monitors", "replay"]
