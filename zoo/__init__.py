"""A zoo of deep equilibrium models.

>>> zoo.list_models("tanh*")
>>> model = zoo.create_model("tanh_deq", num_classes=10)
>>> model = zoo.load_pretrained("tanh_deq.digits")
"""

from . import implicit
from .backbone import load_backbone
from .errors import InputError, ReinitializedWarning, WeightsError
from .exporting import export
from .flow import DEQFlow, FlowCell
from .freezing import freeze, freeze_statistics, unfreeze
from .hubs import from_pretrained, push_to_hub, save_pretrained
from .mdeq import MDEQ, MDEQCell, MDEQSegmenter
from .originals import UnusedWeightsWarning, load_original
from .records import WeightsRecord, list_weights
from .registry import ModelSpec, create_model, list_models, register_model, spec_of
from .resnet import ResNet
from .stacked_transformer import StackedTransformer
from .tanh import TanhCell, TanhDEQ
from .transformer import DEQTransformer, Memory
from .video import FlowState, FlowStream
from .weight_files import save_weights
from .weights import load_pretrained

__all__ = [
    "MDEQ",
    "DEQFlow",
    "DEQTransformer",
    "FlowCell",
    "FlowState",
    "FlowStream",
    "InputError",
    "MDEQCell",
    "MDEQSegmenter",
    "Memory",
    "ModelSpec",
    "ReinitializedWarning",
    "ResNet",
    "StackedTransformer",
    "TanhCell",
    "TanhDEQ",
    "UnusedWeightsWarning",
    "WeightsError",
    "WeightsRecord",
    "create_model",
    "export",
    "freeze",
    "freeze_statistics",
    "from_pretrained",
    "implicit",
    "list_models",
    "list_weights",
    "load_backbone",
    "load_original",
    "load_pretrained",
    "push_to_hub",
    "register_model",
    "save_pretrained",
    "save_weights",
    "spec_of",
    "unfreeze",
]
