-- What every transition builds on: the clock, a task's fields, its timers, and the record for the outbox.
--
-- KEYS[1] is the base of the shard's names; the names' suffixes, the states and the reasons stand above this file, written
-- by scripts.py. ARGV is a list of operations, each as its name, the number of its arguments, and those. An operation
-- returns a flat array. Whole numbers up to 2^53 are exact in Lua; fences are not that small and stay strings throughout.

local BASE = KEYS[1]
TASK, PROGRESS, IDEMPOTENCY, QUEUE = BASE .. TASK, BASE .. PROGRESS, BASE .. IDEMPOTENCY, BASE .. QUEUE
DUE, INDEX, OPEN, FENCE, OUT = BASE .. DUE, BASE .. INDEX, BASE .. OPEN, BASE .. FENCE, BASE .. OUT

local clock = redis.call('TIME')
local NOW_US = clock[1] * 1000000 + clock[2]
local NOW = math.floor(NOW_US / 1000)

local OPS = {}

-- A task's fields:
--   s state · m method · q request · o options · su submitted, us · eu ended, us · n revision · k idempotency key's digest
--   a attempt · f fence · g agent · i instance · c attempts that were started · d offers in a row that nobody took
--   tp, tu traceparent of the task's span, and the span above it · ap traceparent of the attempt's span
--   h digest of the contract under which it was submitted
--   rf, rg fence and agent of the last accepted result · ca "1" once the agent has acknowledged a cancel · pi index of the last progress
--   r response · xc, xm, xt final failure: reason, message, error type · e failures of earlier attempts
--   timers, ms: lo offer · le lease · la attempt · ls stall · lt total · lr retry · lf forget
local FIELDS = {
  's', 'm', 'o', 'n', 'k', 'a', 'f', 'g', 'i', 'c', 'd', 'tp', 'tu', 'ap', 'rf', 'rg', 'ca', 'pi', 'h',
  'lo', 'le', 'la', 'ls', 'lt', 'lr', 'lf',
}
local TIMERS = { 'lo', 'le', 'la', 'ls', 'lt', 'lr', 'lf' }
local NUMBERS = { 'n', 'a', 'c', 'd', 'pi', 'lo', 'le', 'la', 'ls', 'lt', 'lr', 'lf' }

local function load(id)
  local values = redis.call('HMGET', TASK .. id, unpack(FIELDS))
  if not values[1] then return nil end
  local task = { id = id }
  for at, name in ipairs(FIELDS) do task[name] = values[at] or '' end
  for _, name in ipairs(NUMBERS) do task[name] = tonumber(task[name]) or 0 end
  return task
end

local function options(task)
  local o = {}
  o.heartbeat, o.attempt, o.stall, o.total, o.attempts, o.initial, o.maximum, o.multiplier, o.grace = string.match(
    task.o, '^(%d+),(%d+),(%d+),(%d+),(%d+),(%d+),(%d+),([%d.]+),(%d+)$')
  for name, value in pairs(o) do o[name] = tonumber(value) end
  return o
end

local function whole(number) return string.format('%.0f', number) end

-- Writes the named fields, and puts the task where its next timer says.
local function save(task, ...)
  local values = {}
  for at = 1, select('#', ...) do
    local name = select(at, ...)
    local value = task[name]
    values[2 * at - 1], values[2 * at] = name, type(value) == 'number' and whole(value) or value
  end
  redis.call('HSET', TASK .. task.id, unpack(values))
  local first
  for _, name in ipairs(TIMERS) do
    local at = task[name]
    if at > 0 and (not first or at < first) then first = at end
  end
  if first then redis.call('ZADD', DUE, whole(first), task.id) else redis.call('ZREM', DUE, task.id) end
end

-- Appends the record of a transition; save() must write the field `n` afterwards. The fields come in one order always,
-- so that the stream's nodes name them once.
local function record(task, kind, more)
  task.n = task.n + 1
  local about_attempt = kind == 'offered' or kind == 'started' or kind == 'attempt_ended'
  redis.call('XADD', OUT, '*', 't', task.id, 'n', whole(task.n), 'k', kind, 'm', task.m, 'a', whole(task.a), 'f', task.f,
    'g', task.g, 'i', task.i, 'p', about_attempt and task.ap or task.tp,
    'u', about_attempt and string.sub(task.tp, 37, 52) or task.tu, 'w', whole(NOW_US),
    'c', more.reason or '0', 'x', more.text or '', 'b', whole(more.number or 0), 'y', more.actor or '')
end

local function service(task) return string.match(task.m, '^[^/]*') end

-- Counts an unfinished task of its service, and of the service's contract.
local function count_open(task, change)
  local name = service(task)
  local contract = task.h ~= '' and name .. '@' .. task.h or name
  if redis.call('HINCRBY', OPEN, name, change) <= 0 then redis.call('HDEL', OPEN, name) end
  if contract ~= name and redis.call('HINCRBY', OPEN, contract, change) <= 0 then redis.call('HDEL', OPEN, contract) end
end

local function ended(task) return task.s == SUCCEEDED or task.s == FAILED or task.s == CANCELLED end

local function no_timers(task)
  for _, name in ipairs(TIMERS) do task[name] = 0 end
end

-- Ends the task for good. All that belongs to it goes together, a while later.
local function finish(task, state)
  local queued = task.s == QUEUED and task.lr == 0
  task.s = state
  no_timers(task)
  task.lf = NOW + RETENTION
  if queued then redis.call('ZREM', QUEUE .. task.m, task.id) end
  count_open(task, -1)
  redis.call('HSET', TASK .. task.id, 'eu', whole(NOW_US))
  save(task, 's', 'n', 'rf', 'rg', 'lo', 'le', 'la', 'ls', 'lt', 'lr', 'lf')
  -- The sweep forgets the task at `lf`; should no orchestrator sweep, Redis does it by itself a minute later.
  local last = RETENTION + 60000
  redis.call('PEXPIRE', TASK .. task.id, last)
  redis.call('PEXPIRE', PROGRESS .. task.id, last)
  if task.k ~= '' then redis.call('PEXPIRE', IDEMPOTENCY .. task.k, last) end
end

local function end_as_failed(task, reason, message, error_type)
  redis.call('HSET', TASK .. task.id, 'xc', reason, 'xm', message, 'xt', error_type)
  record(task, 'failed', { reason = reason, text = message })
  finish(task, FAILED)
end

local function end_as_cancelled(task, reason, message)
  redis.call('HSET', TASK .. task.id, 'xc', reason, 'xm', message, 'xt', '')
  record(task, 'cancelled', { reason = reason })
  finish(task, CANCELLED)
end

-- Keeps the failure of an attempt that others follow: the newest 50 of them, oldest first.
local function remember_failure(task, reason, message, error_type)
  local entry = reason .. '\31' .. error_type .. '\31' .. message .. '\30'
  local kept = (redis.call('HGET', TASK .. task.id, 'e') or '') .. entry
  local _, count = string.gsub(kept, '\30', '\30')
  while count > 50 or (#kept > 65536 and count > 1) do
    kept = string.sub(kept, string.find(kept, '\30', 1, true) + 1)
    count = count - 1
  end
  redis.call('HSET', TASK .. task.id, 'e', kept)
end

-- Puts the task back for another attempt, at once or after a wait in milliseconds; returns the wait.
local function requeue(task, wait, reason, message)
  record(task, 'attempt_ended', { reason = reason, text = message, number = wait })
  local total = task.lt
  no_timers(task)
  task.lt, task.s = total, QUEUED
  if wait > 0 then task.lr = NOW + wait else redis.call('ZADD', QUEUE .. task.m, whole(NOW_US), task.id) end
  save(task, 's', 'n', 'd', 'rf', 'rg', 'lo', 'le', 'la', 'ls', 'lt', 'lr', 'lf')
  return wait
end

-- A started attempt ended without a result: another one, or the task's end. Returns the wait, or nil at the end.
local function attempt_failed(task, reason, message, error_type, retry)
  if task.s == CANCELLING then
    end_as_cancelled(task, REASON_CANCELLED, 'the task was cancelled; its attempt ended otherwise: ' .. message)
    return nil
  end
  local o = options(task)
  if not retry or task.c >= o.attempts then
    end_as_failed(task, reason, message, error_type)
    return nil
  end
  remember_failure(task, reason, message, error_type)
  local wait = math.floor(math.min(o.initial * o.multiplier ^ (task.c - 1), o.maximum))
  return requeue(task, wait, reason, message)
end

-- An offer came to nothing. It was no attempt, so it costs none; but who never takes offers must not make us spin.
local function offer_failed(task, reason, message, at_once)
  if task.s == CANCELLING then
    end_as_cancelled(task, REASON_CANCELLED, 'the task was cancelled before it was started')
    return nil
  end
  task.d = task.d + 1
  local wait = at_once and task.d <= 3 and 0 or math.min(100 * 2 ^ (task.d - 1), 5000)
  return requeue(task, wait, reason, message)
end

-- The task, when the report comes from the holder of its current attempt; else nil.
local function held(id, fence, agent)
  local task = load(id)
  if task and task.f == fence and task.g == agent and (task.s == OFFERED or task.s == RUNNING or task.s == CANCELLING)
  then
    return task
  end
  return nil, task
end

-- The agent has taken the attempt: the clocks start. True if it had not before.
local function start(task)
  if task.lo == 0 then return false end
  local o = options(task)
  if task.s == OFFERED then task.s = RUNNING end
  task.lo, task.d, task.c = 0, 0, task.c + 1
  task.le, task.la = NOW + o.heartbeat, NOW + o.attempt
  task.ls = o.stall > 0 and NOW + o.stall or 0
  record(task, 'started', {})
  save(task, 's', 'n', 'c', 'd', 'lo', 'le', 'la', 'ls')
  return true
end
