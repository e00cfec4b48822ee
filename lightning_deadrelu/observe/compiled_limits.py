"""Room for our graphs beside those that a user's limits allow a compiler, for as long as a watch needs it."""

from __future__ import annotations

import weakref
from types import CodeType
from typing import Any, ClassVar


class Room:
    """How much the compiler's limits are raised, and for whom; all of it is the process's.

    At the limit a model with ``fullgraph=True`` fails, and any other runs eagerly.
    """

    limits: ClassVar[dict[str, tuple[int, int]]] = {"recompile_limit": (0, 0), "accumulated_recompile_limit": (0, 0)}
    """Each limit as it was last set here, and by how much it was raised."""
    _users: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()
    _graphs: ClassVar[weakref.WeakKeyDictionary[CodeType, int]] = weakref.WeakKeyDictionary()  # ours, by their code

    @classmethod
    def open_for(cls, user: object) -> None:
        """Let each code have our graphs, and one to come."""
        cls._users.add(user)
        cls._raise(max(cls._graphs.values(), default=0) + 1)

    @classmethod
    def note_graph(cls) -> None:
        """Remember that the code being compiled has one graph more than its user asked for."""
        from torch._dynamo.symbolic_convert import InstructionTranslator  # nothing official says what is being compiled

        code = InstructionTranslator.current_tx().output.root_tx.f_code
        cls._graphs[code] = cls._graphs.get(code, 0) + 1
        cls._raise(max(cls._graphs.values()) + 1)

    @classmethod
    def close_for(cls, user: object) -> None:
        """Put the limits back once nobody needs the room, and drop all graphs of codes that have some of ours."""
        cls._users.discard(user)
        if cls._users or not any(share for _, share in cls.limits.values()):
            return
        from torch._dynamo import reset_code  # the official `reset` would drop the graphs of all other codes too

        cls._raise(0)
        for code in list(cls._graphs):
            reset_code(code)  # else they would count as the user's
        cls._graphs.clear()

    @classmethod
    def _raise(cls, share: int) -> None:
        from torch._dynamo import config  # the limits have no official place

        for name, (left, ours) in cls.limits.items():
            limit = getattr(config, name, None)  # other versions of the compiler call it otherwise
            if limit is not None:
                users = limit - ours if limit == left else limit  # it may have been set anew
                setattr(config, name, users + share)
                cls.limits[name] = users + share, share
