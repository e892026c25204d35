"""Who speaks in a trajectory: a policy of either kind, one message at a time.

`TokenSpeaker` makes a speaker of a TokenPolicy and the chat format, token in and token out: what the policy sampled is kept as
the ids it sampled, and only what was said to it since is tokenised. `ChatSpeaker` wraps a policy that shows no tokens.
`ChatOfTokens` is the same adapter as a ChatPolicy, for synthesis and evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rorqual.chat import Tokenizer, encode_tokens, with_tools
from rorqual.chat.markers import find_reserved
from rorqual.chat.parser import parse_tokens
from rorqual.policy import ChatPolicy, ChatReply, Completion, Message, SamplingParams, StopReason, TokenPolicy


@dataclass(frozen=True)
class Spoken:
    """One message, and the tokens behind it where the policy shows them. `malformed` says why it is no message."""

    message: Message
    stop_reason: StopReason
    completion: Completion | None = None
    context_tokens: int = 0
    sampled_tokens: int = 0
    malformed: str = ""


class Speaker(Protocol):
    """Belongs to one trajectory."""

    def context_tokens(self, messages: Sequence[Message]) -> int:
        """How long the prompt for the next message would be."""
        ...

    async def speak(self, messages: Sequence[Message], params: SamplingParams) -> Spoken: ...


@dataclass(frozen=True)
class ChatMode:
    """How the chat format is used."""

    thinking: bool = True
    drop_thinking: bool = True
    """False keeps earlier reasoning at a new user message, so that a trajectory stays one sample."""


class Conversation:
    """The ids a policy has seen and sampled so far, and how they go on.

    While messages are only appended and none of them makes the format rewrite what stands (in thinking mode a new user message
    does: earlier reasoning goes), the prompt is the ids so far and those of the new messages. Else all is encoded afresh.
    """

    def __init__(self, tokenizer: Tokenizer, mode: ChatMode):
        self.tokenizer, self.mode = tokenizer, mode
        self._messages: list[Message] = []
        self._tokens: list[int] = []

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids to sample from after `messages`."""
        known, fresh = len(self._messages), list(messages[len(self._messages) :])
        grows = known > 0 and list(messages[:known]) == self._messages and not self._rewrites(fresh)
        if not grows:
            return encode_tokens(messages, self.tokenizer, self.mode.thinking, self.mode.drop_thinking)
        if not fresh:
            return list(self._tokens)
        context = self._messages
        return self._tokens + encode_tokens(
            fresh, self.tokenizer, self.mode.thinking, self.mode.drop_thinking, context, add_bos=False
        )

    def sampled(self, messages: Sequence[Message], message: Message, completion: Completion) -> None:
        """Keep what was sampled after `messages`."""
        self._messages = [*messages, message]
        self._tokens = [*completion.prompt_tokens, *completion.tokens]

    def _rewrites(self, fresh: Sequence[Message]) -> bool:
        drops = self.mode.thinking and self.mode.drop_thinking
        return drops and any(message.get("role") in ("user", "developer") for message in fresh)


class TokenSpeaker:
    """A TokenPolicy that speaks the chat format. The end-of-sentence token ends a message."""

    def __init__(self, policy: TokenPolicy, tokenizer: Tokenizer, tools: Sequence[Mapping[str, Any]], mode: ChatMode):
        self.policy, self.tokenizer, self.tools, self.mode = policy, tokenizer, tuple(tools), mode
        self.conversation = Conversation(tokenizer, mode)
        self._calls = 0

    def context_tokens(self, messages: Sequence[Message]) -> int:
        return len(self.conversation.prompt(with_tools(messages, self.tools)))

    async def speak(self, messages: Sequence[Message], params: SamplingParams) -> Spoken:
        shown = with_tools(messages, self.tools)
        params = replace(params, stop_tokens=(*params.stop_tokens, self.tokenizer.eos_id))
        completion = await self.policy.complete(self.conversation.prompt(shown), params)
        message, malformed = self._read(completion)
        self.conversation.sampled(shown, message, completion)
        return Spoken(
            message, completion.stop_reason, completion, len(completion.prompt_tokens), len(completion.tokens), malformed
        )

    def _read(self, completion: Completion) -> tuple[Message, str]:
        """The message of a completion, strictly read; where it breaks the format its text stays content, with the reason."""
        message = parse_tokens(completion.tokens, self.tokenizer, self.mode.thinking, new_id=self._new_id)
        for name in ("reasoning_content", "content"):
            marker = find_reserved(message.get(name) or "")
            if marker:
                return message, f"{marker} stands in the {name}, where the format allows none"
        return message, ""

    def _new_id(self) -> str:
        """Call ids by number: a trajectory is the same one whenever it is played."""
        self._calls += 1
        return f"call_{self._calls}"


class ChatSpeaker:
    """A ChatPolicy: lengths are those it reports, or where it reports none a quarter of the characters."""

    def __init__(self, policy: ChatPolicy, tools: Sequence[Mapping[str, Any]]):
        self.policy, self.tools = policy, tuple(tools)
        self._reported = (0, 0)  # messages of the last prompt, and its length with the reply

    def context_tokens(self, messages: Sequence[Message]) -> int:
        count, tokens = self._reported
        fresh = messages[count:] if count <= len(messages) else messages
        return (tokens if count <= len(messages) else 0) + sum(map(_characters, fresh)) // 4

    async def speak(self, messages: Sequence[Message], params: SamplingParams) -> Spoken:
        reply = await self.policy.reply(messages, self.tools, params)
        prompt = reply.usage.get("prompt_tokens") or sum(map(_characters, messages)) // 4
        sampled = reply.usage.get("completion_tokens") or _characters(reply.message) // 4
        self._reported = (len(messages) + 1, prompt + sampled)
        return Spoken(reply.message, reply.stop_reason, reply.completion, prompt, sampled)


class ChatOfTokens:
    """A ChatPolicy made of a TokenPolicy and the chat format. It keeps no conversation: each reply is encoded afresh."""

    def __init__(self, policy: TokenPolicy, tokenizer: Tokenizer, mode: ChatMode | None = None):
        self.policy, self.tokenizer, self.mode = policy, tokenizer, mode or ChatMode()

    async def reply(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], params: SamplingParams) -> ChatReply:
        spoken = await TokenSpeaker(self.policy, self.tokenizer, tools, self.mode).speak(messages, params)
        usage = {"prompt_tokens": spoken.context_tokens, "completion_tokens": spoken.sampled_tokens}
        message = spoken.message | ({"failure": spoken.malformed} if spoken.malformed else {})
        return ChatReply(message, spoken.stop_reason, spoken.completion, usage)


def _characters(message: Message) -> int:
    calls = message.get("tool_calls") or ()
    parts = [message.get("content"), message.get("reasoning_content"), *(str(call.get("function")) for call in calls)]
    return sum(len(str(part)) for part in parts if part)
