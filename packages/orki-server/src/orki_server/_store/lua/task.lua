-- Base of all operations: the clock, a task's fields, its state and timers, and the outbox record.
--
-- The constants above are generated from Python. KEYS[1] is the prefix of the shard's keys. ARGV is a list of operations:
-- name, number of arguments, arguments. Each operation returns a flat array. Lua's numbers are exact up to 2^53; fences
-- exceed that and stay strings.

local clock = redis.call('TIME')
local NOW_US = clock[1] * 1000000 + clock[2]
local NOW = math.floor(NOW_US / 1000)

local OPS = {}

local function whole(number) return string.format('%.0f', number) end

-- A task from the values of FIELDS; `stored` keeps what Redis has, in the same order.
local function build(id, values)
  local task = { id = id, stored = values }
  for at = 1, #FIELDS do
    local name, value = FIELDS[at], values[at] or ''
    if NUMBERS[name] then value = tonumber(value) or 0 end
    task[name], values[at] = value, value
  end
  task.stored_state = task.state
  return task
end

local function load(id)
  local values = redis.call('HMGET', TASK .. id, unpack(FIELDS))
  return values[1] and build(id, values) or nil
end

-- Timeouts and waits are in milliseconds; 0 as `stall` or `total` means no limit.
local function options(task)
  local o = {}
  o.heartbeat, o.attempt, o.stall, o.total, o.attempts, o.initial, o.maximum, o.multiplier, o.grace = string.match(
    task.options, '^(%d+),(%d+),(%d+),(%d+),(%d+),(%d+),(%d+),([%d.]+),(%d+)$')
  for name, value in pairs(o) do o[name] = tonumber(value) end
  return o
end

-- The only place that assigns the state. An event that the table does not list fails before anything is written.
-- A new task has no state yet: it is ABSENT.
local function move(task, event)
  local state = task.state ~= '' and task.state or 'ABSENT'
  local following = MOVES[state][event]
  if not following then error({ err = 'ERR ' .. event .. ' is illegal in state ' .. state }) end
  task.state = following
end

-- Writes the fields that changed.
local function write(task)
  local changes, count, stored = {}, 0, task.stored
  for at = 1, #FIELDS do
    local name = FIELDS[at]
    local value = task[name]
    if value ~= stored[at] then
      changes[count + 1], changes[count + 2] = name, NUMBERS[name] and whole(value) or value
      count, stored[at] = count + 2, value
    end
  end
  if changes[1] then redis.call('HSET', TASK .. task.id, unpack(changes)) end
end

-- Writes the fields that changed and sorts the task by its next timer.
local function save(task)
  write(task)
  local first
  for _, timer in ipairs(TIMERS) do
    local due = task[timer[1]]
    if due > 0 and (not first or due < first) then first = due end
  end
  if first then redis.call('ZADD', NEXT_TIMERS, whole(first), task.id) else redis.call('ZREM', NEXT_TIMERS, task.id) end
end

local function stop_timers(task)
  for _, timer in ipairs(TIMERS) do task[timer[1]] = 0 end
end

local OF_ATTEMPT = { offered = true, started = true, attempt_ended = true }

-- Appends the outbox record of a transition. All records have the same fields in the same order, which lets Redis
-- store the names once. The caller saves the task.
local function record(task, kind, more)
  task.revision = task.revision + 1
  local values = {
    task_id = task.id,
    revision = whole(task.revision),
    kind = kind,
    method = task.method,
    attempt = whole(task.attempt),
    fence = task.fence,
    agent_id = task.agent_id,
    instance_id = task.instance_id,
    traceparent = OF_ATTEMPT[kind] and task.attempt_traceparent or task.traceparent,
    parent_id = OF_ATTEMPT[kind] and string.sub(task.traceparent, 37, 52) or task.parent_id,
    time_us = whole(NOW_US),
    reason = more.reason or '0',
    text = more.text or '',
    number = whole(more.number or 0),
    actor = more.actor or '',
  }
  local entry = {}
  for at = 1, #RECORD_FIELDS do
    local name = RECORD_FIELDS[at]
    entry[2 * at - 1], entry[2 * at] = name, values[name]
  end
  redis.call('XADD', OUTBOX, '*', unpack(entry))
end

-- Adds to the number of unfinished tasks of the service and of its contract.
local function count_open(task, change)
  local service = string.match(task.method, '^[^/]*')
  local names = { service }
  if task.contract ~= '' then names[2] = service .. '@' .. task.contract end
  for _, name in ipairs(names) do
    if redis.call('HINCRBY', OPEN, name, change) <= 0 then redis.call('HDEL', OPEN, name) end
  end
end

local function enqueue(task) redis.call('ZADD', QUEUE .. task.method, whole(NOW_US), task.id) end

-- Completes a move to a final state. The sweep removes the task and its keys after the retention.
local function finish(task)
  if task.stored_state == 'QUEUED' then redis.call('ZREM', QUEUE .. task.method, task.id) end
  stop_timers(task)
  task.forget_due = NOW + RETENTION
  count_open(task, -1)
  redis.call('HSET', TASK .. task.id, 'ended_us', whole(NOW_US))
  save(task)
  -- Without any orchestrator, Redis removes the keys a minute after the sweep would have done so.
  local last = RETENTION + 60000
  redis.call('PEXPIRE', TASK .. task.id, last)
  redis.call('PEXPIRE', PROGRESS .. task.id, last)
  if task.idempotency ~= '' then redis.call('PEXPIRE', IDEMPOTENCY .. task.idempotency, last) end
end

local function set_failure(task, reason, message, error_type)
  redis.call('HSET', TASK .. task.id, 'failure_reason', reason, 'failure_message', message, 'failure_type', error_type)
end

-- Completes a move to FAILED.
local function finish_failed(task, reason, message, error_type)
  set_failure(task, reason, message, error_type)
  record(task, 'failed', { reason = reason, text = message })
  finish(task)
end

-- Completes a move to CANCELLED.
local function finish_cancelled(task, reason, message)
  set_failure(task, reason, message, '')
  record(task, 'cancelled', { reason = reason })
  finish(task)
end

-- Keeps the failure of an attempt that is followed by another: at most 50 of them and 64 KiB, oldest first.
local function remember_failure(task, reason, message, error_type)
  local entry = reason .. '\31' .. error_type .. '\31' .. message .. '\30'
  local kept = (redis.call('HGET', TASK .. task.id, 'earlier_failures') or '') .. entry
  local _, count = string.gsub(kept, '\30', '\30')
  while count > 50 or (#kept > 65536 and count > 1) do
    kept = string.sub(kept, string.find(kept, '\30', 1, true) + 1)
    count = count - 1
  end
  redis.call('HSET', TASK .. task.id, 'earlier_failures', kept)
end

-- Completes a move to WAITING: another attempt follows after the wait (ms), which is returned.
local function requeue(task, wait, reason, message)
  record(task, 'attempt_ended', { reason = reason, text = message, number = wait })
  local total = task.total_due
  stop_timers(task)
  task.total_due = total
  if wait > 0 then
    task.retry_due = NOW + wait
  else
    move(task, 'RetryDue')
    enqueue(task)
  end
  save(task)
  return wait
end

-- After a move that answers the offer: counts the attempt and starts its clocks. False if it was answered before.
local function begin(task)
  if task.offer_due == 0 then return false end
  local o = options(task)
  task.offer_due, task.refused_offers, task.started = 0, 0, task.started + 1
  task.lease_due, task.attempt_due = NOW + o.heartbeat, NOW + o.attempt
  task.stall_due = o.stall > 0 and NOW + o.stall or 0
  record(task, 'started', {})
  return true
end

-- Ends an attempt without a result, by `event` or, if no attempt is left, by AttemptsExhausted.
-- Returns the wait before the next attempt (ms), or nil if the task has ended.
local function end_attempt(task, event, reason, message, error_type, retryable)
  local o = options(task)
  local started = task.started + (task.offer_due > 0 and 1 or 0)
  move(task, retryable and started < o.attempts and event or 'AttemptsExhausted')
  begin(task)
  if task.state == 'CANCELLED' then
    finish_cancelled(task, REASON_CANCELLED, 'the task was cancelled; its attempt failed: ' .. message)
    return nil
  elseif task.state == 'FAILED' then
    finish_failed(task, reason, message, error_type)
    return nil
  end
  remember_failure(task, reason, message, error_type)
  return requeue(task, math.floor(math.min(o.initial * o.multiplier ^ (started - 1), o.maximum)), reason, message)
end

-- Ends an offer that was not accepted. It costs no attempt; the wait after several of them prevents a busy loop.
-- Returns as end_attempt.
local function end_offer(task, event, reason, message, at_once)
  move(task, event)
  if task.state == 'CANCELLED' then
    finish_cancelled(task, REASON_CANCELLED, 'the task was cancelled before it was started')
    return nil
  end
  task.refused_offers = task.refused_offers + 1
  local wait = at_once and task.refused_offers <= 3 and 0 or math.min(100 * 2 ^ (task.refused_offers - 1), 5000)
  return requeue(task, wait, reason, message)
end

local HELD = { OFFERED = true, RUNNING = true, CANCELLING_OFFER = true, CANCELLING = true }

-- The task if this agent holds its current attempt; otherwise nil, and the task as a second value if it exists.
local function held(id, fence, agent_id)
  local task = load(id)
  if task and task.fence == fence and task.agent_id == agent_id and HELD[task.state] then return task end
  return nil, task
end
