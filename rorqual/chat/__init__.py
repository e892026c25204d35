"""Floor 0: the DeepSeek-V3.2 chat format over strings and token ids; imports no torch."""

from rorqual.chat.encoder import EncodedChat, encode, encode_spans, encode_tokens, encode_with_sources
from rorqual.chat.errors import ChatError
from rorqual.chat.markers import SPECIAL_TOKENS
from rorqual.chat.messages import with_tools
from rorqual.chat.spans import Source, Span
from rorqual.chat.tokenizer import Detokenizer, Piece, Tokenizer

__all__ = ["SPECIAL_TOKENS", "ChatError", "Detokenizer", "EncodedChat", "Piece", "Source", "Span", "Tokenizer", "encode"]
__all__ += ["encode_spans", "encode_tokens", "encode_with_sources", "with_tools"]
