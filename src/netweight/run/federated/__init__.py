"""Federated runs: clients keep their rows; only updates travel."""

from netweight.run.federated.client import Client
from netweight.run.federated.codecs import Full, Int8, RandomK, TopK
from netweight.run.federated.inprocess import InProcess
from netweight.run.federated.options import FedAdam, FedAvg, FedProx, Rounds, Scaffold, Travel
from netweight.run.federated.privacy import Automatic, ClientLevel, RowLevel
from netweight.run.federated.report import FederationReport
from netweight.run.federated.server import Federated

__all__ = [
    "Automatic",
    "Client",
    "ClientLevel",
    "FedAdam",
    "FedAvg",
    "FedProx",
    "Federated",
    "FederationReport",
    "Full",
    "InProcess",
    "Int8",
    "RandomK",
    "Rounds",
    "RowLevel",
    "Scaffold",
    "TopK",
    "Travel",
]
