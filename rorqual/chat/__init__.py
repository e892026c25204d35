"""Floor 0: the DeepSeek-V3.2 chat format over strings and token ids; imports no torch."""

from rorqual.chat.deltas import Delta, MessageBuilder, Repair, new_id, no_id, to_openai
from rorqual.chat.encoder import EncodedChat, encode, encode_spans, encode_tokens, encode_with_sources
from rorqual.chat.errors import ChatError
from rorqual.chat.markers import SPECIAL_TOKENS
from rorqual.chat.messages import with_tools
from rorqual.chat.parser import parse, parse_tokens, parse_with_repairs
from rorqual.chat.spans import Source, Span
from rorqual.chat.stream import StreamParser
from rorqual.chat.template import chat_template
from rorqual.chat.tokenizer import Detokenizer, Piece, Tokenizer

__all__ = ["SPECIAL_TOKENS", "ChatError", "Delta", "Detokenizer", "EncodedChat", "MessageBuilder", "Piece", "Repair"]
__all__ += ["Source", "Span", "StreamParser", "Tokenizer", "encode", "encode_spans", "encode_tokens", "encode_with_sources"]
__all__ += ["chat_template", "new_id", "no_id", "parse", "parse_tokens", "parse_with_repairs", "to_openai", "with_tools"]
