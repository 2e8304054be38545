"""Boards: one declarative file each, and what makes and loads their bitstreams."""

from .ulx3s import ULX3S_85F, ULX3S_85F_LANGUAGE, ULX3S_85F_LARGE

__all__ = ["BOARDS"]

BOARDS = {board.name: board for board in (ULX3S_85F, ULX3S_85F_LANGUAGE, ULX3S_85F_LARGE)}
