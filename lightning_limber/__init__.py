"""Watch pictures become language: train an adapter between a frozen vision encoder and a frozen LLM
and measure, while it trains, where in the LLM the image tokens start to look like text.
"""

__version__ = "0.1.0"
