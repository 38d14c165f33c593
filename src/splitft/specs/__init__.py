"""The specifications: one frozen model for each section of a configuration, with units, bounds and defaults.

A room takes its own spec and nothing else; `config` combines them into the file that a user writes. Unknown
keys are errors, so that a typo is never silently ignored. No torch here.
"""

from splitft.specs.base import Spec, field_docs
from splitft.specs.codecs import CodecChoice
from splitft.specs.compute_devices import DevicesSpec
from splitft.specs.data import ClientsSpec, DataSpec, ModelSpec, SharesSpec
from splitft.specs.deploy import DeploySpec
from splitft.specs.privacy import LabelsSpec, PrivacySpec, RowDefenceSpec, SiteBoundsSpec, UpdatesSpec
from splitft.specs.schedule import ChangeSpec, DeviceName, DeviceSpec, LinkName, LinkSpec, ScheduleSpec
from splitft.specs.site import (
    SiteAllowsSpec,
    SiteLimitsSpec,
    SiteMachineSpec,
    SiteModelSpec,
    SiteSpec,
    SiteTextSpec,
)
from splitft.specs.training import AggregateSpec, LoraSpec, ServerAdapters, SplitSpec, TrainingSpec
from splitft.specs.wire import WireSpec

__all__ = [
    "AggregateSpec",
    "ChangeSpec",
    "ClientsSpec",
    "CodecChoice",
    "DataSpec",
    "DeploySpec",
    "DeviceName",
    "DeviceSpec",
    "DevicesSpec",
    "LabelsSpec",
    "LinkName",
    "LinkSpec",
    "LoraSpec",
    "ModelSpec",
    "PrivacySpec",
    "RowDefenceSpec",
    "ScheduleSpec",
    "ServerAdapters",
    "SharesSpec",
    "SiteAllowsSpec",
    "SiteBoundsSpec",
    "SiteLimitsSpec",
    "SiteMachineSpec",
    "SiteModelSpec",
    "SiteSpec",
    "SiteTextSpec",
    "Spec",
    "SplitSpec",
    "TrainingSpec",
    "UpdatesSpec",
    "WireSpec",
    "field_docs",
]
