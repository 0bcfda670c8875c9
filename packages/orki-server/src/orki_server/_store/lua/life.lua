-- The steps that several operations share: records of transitions, ends of tasks, ends of attempts and offers.

local OF_ATTEMPT = { offered = true, started = true, attempt_ended = true }

local function attempt_traceparent(task)
  if task.span_of ~= task.attempt then
    task.span_of = task.attempt
    task.span = string.sub(task.traceparent, 1, 36)
      .. string.sub(redis.sha1hex(task.id .. '/' .. whole(task.attempt)), 1, 16) .. string.sub(task.traceparent, 53)
  end
  return task.span
end

local function clean(text) return (string.gsub(text, '[\30\31]', ' ')) end

-- Adds the record of a transition: the fields in the order of RECORD_FIELDS in _fields.py.
local function record(task, kind, more)
  more = more or NOTHING
  task.revision = task.revision + 1
  touch(task)
  local of_attempt = OF_ATTEMPT[kind]
  RECORDS[#RECORDS + 1] = {
    task.id,
    task.revision,
    kind,
    task.method,
    task.attempt,
    task.fence,
    task.agent_id,
    task.instance_id,
    of_attempt and attempt_traceparent(task) or task.traceparent,
    of_attempt and string.sub(task.traceparent, 37, 52) or task.parent_id,
    WALL_TEXT,
    more.reason or '0',
    more.text and clean(more.text) or '',
    more.number or 0,
    more.actor and clean(more.actor) or '',
  }
end

-- Puts the task at the end of its queue. The shard's clock orders the queue, as the server's may step back.
local function enqueue(task) task.queued_us = CLOCK_US end

local function stop_timers(task)
  for _, timer in ipairs(TIMERS) do task[timer[1]] = 0 end
end

-- Completes a move to a final state. The sweep removes the task and its keys after the retention.
local function finish(task)
  stop_timers(task)
  task.forget_due, task.ended_us = NOW + RETENTION, WALL_US
  if task.more_text ~= '' or task.fields.more then
    for _, name in ipairs({ 'checkpoint', 'answer' }) do set(task, name, '') end
    if more(task).children then
      if task.state == 'SUCCEEDED' then
        WRITES[#WRITES + 1] = { 'DEL', CHILDREN .. task.id }
      else
        typed(ORPHANS, 'zset')
        WRITES[#WRITES + 1] = { 'ZADD', ORPHANS, whole(WALL_US), task.id }
        WRITES[#WRITES + 1] = { 'HSET', CLOCK, 'orphans', '1' }
        set_due(NOW) -- A sweep looks for them.
      end
    end
    remember(task, { checkpoint = '', overdue = '', total_left = '', over_budget = '' })
  end
  sort(task)
  -- Without any orchestrator, Redis removes the keys a minute after the sweep would have done so.
  local last = whole(RETENTION + 60000)
  WRITES[#WRITES + 1] = { 'PEXPIRE', TASK .. task.id, last }
  if owns_budget(task) then WRITES[#WRITES + 1] = { 'PEXPIRE', BUDGETS .. task.id, last } end
  if task.progress_number > 0 then WRITES[#WRITES + 1] = { 'PEXPIRE', PROGRESS .. task.id, last } end
  if task.idempotency ~= '' then WRITES[#WRITES + 1] = { 'PEXPIRE', IDEMPOTENCY .. task.idempotency, last } end
end

local function set_failure(task, reason, message, error_type)
  set(task, 'failure', reason .. '\31' .. clean(error_type) .. '\31' .. clean(message))
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
  local kept = task.fields.failures or redis.call('HGET', TASK .. task.id, 'failures') or ''
  kept = kept .. reason .. '\31' .. clean(error_type) .. '\31' .. clean(message) .. '\30'
  local _, count = string.gsub(kept, '\30', '\30')
  while count > 50 or (#kept > 65536 and count > 1) do
    kept = string.sub(kept, string.find(kept, '\30', 1, true) + 1)
    count = count - 1
  end
  set(task, 'failures', kept)
end

-- Completes a move to WAITING: another attempt follows after the wait (ms), which is returned.
local function requeue(task, wait, reason, message)
  record(task, 'attempt_ended', { reason = reason, text = message, number = wait })
  local total = task.total_due
  stop_timers(task)
  task.total_due, task.suspected = total, ''
  if wait > 0 then
    task.retry_due = NOW + wait
  else
    move(task, 'RetryDue')
    enqueue(task)
  end
  sort(task)
  return wait
end

-- Completes a move to SUSPENDED: the task waits for an answer, for at most `deadline` (ms; 0 for no limit). The total
-- timeout pauses.
local function suspend(task, question, deadline)
  record(task, 'suspended', { text = question, number = deadline })
  local left = task.total_due > 0 and whole(math.max(1, task.total_due - NOW)) or ''
  stop_timers(task)
  task.suspected = ''
  if deadline > 0 then task.retry_due = NOW + deadline end
  local number = (tonumber(more(task).suspension) or 0) + 1
  set(task, 'answer', '')
  remember(task, { suspension = whole(number), question = question, suspended_us = WALL_TEXT, deadline = whole(deadline),
    answered = '', overdue = '', total_left = left })
  sort(task)
end

-- Completes a move of a suspended task to QUEUED.
local function resume(task, details)
  record(task, 'resumed', details)
  local left = tonumber(more(task).total_left) or 0
  stop_timers(task)
  if left > 0 then task.total_due = NOW + left end
  remember(task, { total_left = '' })
  enqueue(task)
  sort(task)
end

-- The caller hears the agent. What it missed before is added to the attempt's timers. An orchestrator that has just come
-- back reads what agents sent long ago, also hellos; an agent may have given the attempt up since then.
local function heard(task)
  if task.host == CALLER and NOW - host_of(CALLER).since < MAX_STEP then return end
  local missed = task.host == CALLER and ABSENT.own - task.absent or 0
  if missed > 0 then
    if task.stall_due > 0 then task.stall_due = task.stall_due + missed end
    if task.attempt_due > 0 then task.attempt_due = task.attempt_due + missed end
  end
  task.host, task.absent, task.excused = CALLER, ABSENT.own, ''
end

-- After a move that answers the offer: counts the attempt and starts its clocks. False if it was answered before.
local function begin(task)
  if task.offer_due == 0 then return false end
  local o = options(task)
  heard(task)
  task.offer_due, task.refused_offers, task.suspected, task.started = 0, 0, '', task.started + 1
  task.lease_due, task.attempt_due = NOW + o.heartbeat, NOW + o.attempt
  task.stall_due = o.stall > 0 and NOW + o.stall or 0
  record(task, 'started')
  return true
end

-- Wait before the next try after `count` tries that were not the task's fault, in a row or in all.
local function pause(count, longest) return math.min(100 * 2 ^ math.min(count - 1, 20), longest) end

-- Ends a cancelled task whose attempt ended otherwise. True if it did.
local function ended_by_cancel(task, message)
  if task.state ~= 'CANCELLED' then return false end
  finish_cancelled(task, REASON_CANCELLED, message)
  return true
end

-- Ends an attempt without a result, by `event` or, if no attempt is left, by AttemptsExhausted.
-- Returns the wait before the next attempt (ms), or nil if the task has ended.
local function end_attempt(task, event, reason, message, error_type, retryable)
  local o = options(task)
  local started = task.started + (task.offer_due > 0 and 1 or 0)
  move(task, retryable and started < o.attempts and event or 'AttemptsExhausted')
  begin(task)
  if ended_by_cancel(task, 'the task was cancelled; its attempt failed: ' .. message) then return nil end
  if task.state == 'FAILED' then
    finish_failed(task, reason, message, error_type)
    return nil
  end
  remember_failure(task, reason, message, error_type)
  local wait = math.min(o.initial * o.multiplier ^ (started - 1), o.maximum)
  return requeue(task, math.floor(wait), reason, message)
end

-- Ends an attempt that did not fail: its agent returned it, or nobody could hear its agent. It is not counted. After
-- MAX_ABANDONED of them it is, so that no task is repeated without end. Returns as end_attempt.
local function abandon(task, reason, message)
  if task.abandoned >= MAX_ABANDONED then return end_attempt(task, 'AttemptFailed', reason, message, '', true) end
  move(task, 'AttemptAbandoned')
  begin(task)
  task.started, task.abandoned = task.started - 1, task.abandoned + 1
  if ended_by_cancel(task, 'the task was cancelled; its attempt was abandoned: ' .. message) then return nil end
  remember_failure(task, reason, message, '')
  return requeue(task, pause(task.abandoned, 30000), reason, message)
end

-- Ends an offer that was not accepted. It costs no attempt; the wait after several of them prevents a busy loop.
-- Returns as end_attempt.
local function end_offer(task, event, reason, message, at_once)
  move(task, event)
  if ended_by_cancel(task, 'the task was cancelled before it was started') then return nil end
  task.refused_offers = task.refused_offers + 1
  return requeue(task, at_once and task.refused_offers <= 3 and 0 or pause(task.refused_offers, 5000), reason, message)
end

-- The task if this agent holds its current attempt; otherwise nil, and the task as a second value if it exists.
local function held(id, fence, agent_id)
  local task = load(id)
  if task and task.fence == fence and task.agent_id == agent_id and HELD[task.state] then return task end
  return nil, task
end

-- As `held`; a damaged task counts as one that does not exist.
local function held_of_several(id, fence, agent_id)
  local done, task, other = pcall(held, id, fence, agent_id)
  if done then return task, other end
  if not is_damage(task) then error(task, 0) end
  return nil
end

-- The task, or nil if it does not exist or is damaged. A damaged one goes from this key to the list of damaged tasks, so
-- that it does not stand in the way of others; `found` gets its id.
local function load_listed(key, id, found, with_request)
  local done, task = pcall(load, id, with_request)
  if done and task then return task end
  if not done and not is_damage(task) then error(task, 0) end
  WRITES[#WRITES + 1] = { 'ZREM', key, id }
  if done then
    WRITES[#WRITES + 1] = { 'ZREM', INDEX, id }
  else
    WRITES[#WRITES + 1] = { 'ZADD', DAMAGED, whole(WALL_US), id }
    found[#found + 1] = id
  end
  return nil
end
