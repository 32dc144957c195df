"""What an engine is used for."""

from enum import Enum


class UsageContext(Enum):
    ENGINE_CONTEXT = "ENGINE_CONTEXT"
    OPENAI_API_SERVER = "OPENAI_API_SERVER"
