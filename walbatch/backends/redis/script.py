"""What runs inside Redis: a batch and its mark, as a script, which nobody else's commands come between.

What is not here: what operations become (`keys`), and which marks are sent.

The idea needed to read it: Redis rolls nothing back. A command that fails in the middle (a key of another type, say) leaves
what came before it, also in MULTI and EXEC, and there the mark would have been sent already. A script sees the error, leaves
that operation out of the mark in the same step, and goes on.

The mark is written first, for whatever makes Redis refuse all writes (memory, disk, a replica) refuses it then, before anything has
changed; after a script's first write Redis refuses no other for such a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from walbatch.backends.redis.keys import Command

ARGUMENTS_MAX: Final = 4_000
"""Of one command: Lua hands over no more than 8,000 values at once."""

VALUES_MAX: Final = 1_000_000
"""Of one script: what Redis takes of a client at once is 1,048,576."""

STALE: Final = 0
DONE: Final = 1

_HEAD: Final = """
local held = redis.call('HMGET', KEYS[1], 'mark', 'out')
local mark, out = held[1] or '', held[2] or ''
if ARGV[3] ~= '' then
  if mark ~= ARGV[1] or out ~= ARGV[2] then return {0, mark, out} end
  redis.call('HSET', KEYS[1], 'mark', ARGV[3])
  if out ~= '' then redis.call('HDEL', KEYS[1], 'out') end
end
local function leave_out(text)
  if ARGV[3] ~= '' and text ~= '' then redis.call('HSET', KEYS[1], 'out', text) end
  return text
end
"""
"""ARGV: the mark that the client takes for the held one, what is left out of it, the mark to hold from now on ('': no marks).
What is left out is LSNs, one after the other; behind one that was applied in part
stands `!`. A mark that is another one is answered, and nothing done."""

READ: Final = """
redis.call('HDEL', KEYS[1], 'opened')
redis.call('HSET', KEYS[1], 'opened', ARGV[1])
return redis.call('HMGET', KEYS[1], 'mark', 'out')
"""
"""A mark that is to be believed. What Redis has read from its files at its start need not be on the disk yet; something written
behind it makes Redis sync it before it answers. HDEL comes first since a full memory does not forbid it, nor what follows then."""

PUT: Final = (
    _HEAD
    + """
-- ARGV: ..., all LSNs, then key, payload, key, payload. All at once, or one by one where one is refused.
local function call(...)
  local ok, answer = pcall(redis.pcall, ...)
  if not ok then return tostring(answer) end
  if type(answer) == 'table' and answer.err then return answer.err end
end
local function put(first, last) return call('MSET', unpack(ARGV, first, last)) end
for first = 5, #ARGV, 4000 do
  local last = math.min(first + 3999, #ARGV)
  local ok, problem = pcall(put, first, last)
  if not ok or problem then
    for at = first, #ARGV, 2 do
      problem = call('SET', ARGV[at], ARGV[at + 1])
      if problem then
        local rest, index = {}, (at - 5) / 2
        for lsn in string.gmatch(ARGV[4], '%d+') do
          if index <= 0 then rest[#rest + 1] = lsn end
          index = index - 1
        end
        return {1, {}, problem, (at - 5) / 2, {}, leave_out(table.concat(rest, ' '))}
      end
    end
    break
  end
end
return {1, {}, '', 0, {}, ''}
"""
)

RUN: Final = (
    _HEAD
    + """
-- ARGV: ..., '1' where answers are wanted and no command may run again, what stays left out whatever happens, then for each
-- operation: its LSN, how many commands, and for each of them how many values, and these. What speaks of the server or the user,
-- and not of an operation, ends it. An operation of which some commands had run before is left out as `LSN!`.
local function run(at, count) return redis.pcall(unpack(ARGV, at, at + count - 1)) end
local ends = {NOPERM = 1, OOM = 1, READONLY = 1, MISCONF = 1, NOREPLICAS = 1, MASTERDOWN = 1, LOADING = 1, BUSY = 1, NOAUTH = 1,
  CROSSSLOT = 1, MOVED = 1, ASK = 1, CLUSTERDOWN = 1, TRYAGAIN = 1, NOSCRIPT = 1}
local function speaks_of_all(text)
  return ends[string.match(text, '^%S*')] or string.find(text, 'nknown Redis command', 1, true)
    or string.find(text, 'nknown command', 1, true) or string.find(text, 'not allowed from script', 1, true)
    or string.find(text, 'Script attempted', 1, true) or string.find(text, 'user executing the script', 1, true)
end
local failed, gone, answers, at, index, total = {}, {}, {}, 6, 0, #ARGV
if ARGV[5] ~= '' then gone[1] = ARGV[5] end
local stopped, stopped_at = '', 0
while at <= total do
  local lsn, commands = ARGV[at], tonumber(ARGV[at + 1])
  at = at + 2
  local answer, problem, part = {}, stopped ~= '' and stopped or nil, ''
  for number = 1, commands do
    local count = tonumber(ARGV[at])
    if not problem then
      local ok, got = pcall(run, at + 1, count)
      if not ok then
        problem = tostring(got)
        stopped, stopped_at = problem, index
      elseif type(got) == 'table' and got.err then
        problem = got.err
        if speaks_of_all(problem) then stopped, stopped_at = problem, index end
      else
        answer[number] = got
      end
      if problem and number > 1 and ARGV[4] == '1' then part = '!' end
    end
    at = at + count + 1
  end
  if problem then
    gone[#gone + 1] = lsn .. part
    if stopped == '' then
      failed[#failed + 1] = index
      failed[#failed + 1] = problem
    end
  end
  if ARGV[4] == '1' then answers[index + 1] = problem and {} or answer end
  index = index + 1
end
return {1, failed, stopped, stopped_at, answers, leave_out(table.concat(gone, ' '))}
"""
)


def pack_put(
    prefix: bytes, keys: Sequence[bytes], payloads: Sequence[bytes], lsns: Sequence[int]
) -> list[bytes]:
    """What `PUT` takes behind the marks."""
    values: list[bytes] = [b""] * (2 * len(keys) + 1)
    values[0] = b" ".join([b"%d" % lsn for lsn in lsns])
    values[1::2] = [prefix + key for key in keys] if prefix else keys
    values[2::2] = payloads
    return values


def pack_run(
    lsns: Sequence[int | None],
    operations: Sequence[Sequence[Command]],
    *,
    wants_answers: bool,
    left_out: bytes,
) -> list[bytes]:
    """What `RUN` takes behind the marks."""
    values = [b"1" if wants_answers else b"", left_out]
    for lsn, commands in zip(lsns, operations, strict=True):
        values += (b"%d" % (lsn or 0), b"%d" % len(commands))
        for command in commands:
            values.append(b"%d" % len(command))
            values += command
    return values
