"""Past one machine, over Ray: tables in many parts, and a server on several nodes. Needs the extra `ray`."""

from netweight.cluster.batch import Batch, predict_parts
from netweight.connect import connected

__all__ = ["Batch", "connected", "predict_parts"]
