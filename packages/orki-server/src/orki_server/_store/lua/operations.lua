-- The operations of a shard. Each is described by a function of the same name in operations.py.

-- --- requests of submitters ---

-- Whether the queues may get the lane of a new task. Their number is bounded, because every offer reads them.
local function admits_lane(task)
  local name = lane(task)
  if name == task.method or redis.call('HEXISTS', LANES, name) == 1 then return true end
  if redis.call('HLEN', LANES) < MAX_LANES then return true end
  local left = 0
  for _, each in ipairs(redis.call('HKEYS', LANES)) do
    if redis.call('EXISTS', QUEUE .. each) == 1 then
      left = left + 1
    else
      WRITES[#WRITES + 1] = { 'HDEL', LANES, each }
    end
  end
  return left < MAX_LANES
end

-- Sets when and where a new task may run: priority ("" for the default), delay (ms) or start (us), and what makes its
-- lane. Returns the wait (ms).
local function set_placement(task, priority, delay, start_us, lane_fields)
  local start = start_us
  if delay > 0 then start = WALL_US + delay * 1000 end
  local wait = math.max(0, math.ceil((start - WALL_US) / 1000))
  local place = lane_fields
  if priority ~= '' or start > 0 or place.labels ~= '' or place.limits ~= '' or place.fairness_key ~= '' then
    place.priority, place.start_us = tonumber(priority) or DEFAULT_PRIORITY, start
    task.place = place
    task.placement = write_placement(task.place)
    set(task, 'placement', task.placement)
  end
  return wait
end

-- -> new | same | conflict | lanes, task id, submitted (us)
OPS.submit = function(a)
  local id, method, request, opts, digest, idempotency, key, traceparent, parent_id, actor, contract, priority, delay,
    start_us, labels, limits, fairness_key, parent, root, accounts, budget = unpack(a)
  local existing = load(id)
  if existing then return { 'new', id, whole(existing.submitted_us) } end
  if idempotency ~= '' then
    flush()
    local found = redis.call('GET', IDEMPOTENCY .. idempotency)
    local other = found and string.sub(found, 66)
    if found and redis.call('EXISTS', TASK .. other) == 1 then
      return { string.sub(found, 1, 64) == digest and 'same' or 'conflict', other, '0' }
    end
  end
  refuse_if_full()
  local task = create(id)
  task.fence, task.method, task.options, task.idempotency, task.contract = '0', method, opts, idempotency, contract
  task.traceparent, task.parent_id, task.submitted_us = traceparent, parent_id, WALL_US
  local wait = set_placement(task, priority, tonumber(delay), tonumber(start_us),
    { labels = labels, limits = limits, fairness_key = fairness_key })
  if not admits_lane(task) then return { 'lanes', id, '0' } end
  set_lineage(task, parent, root, accounts, budget)
  local total = options(task).total
  if total > 0 then task.total_due = NOW + wait + total end
  move(task, wait > 0 and 'Delayed' or 'Submitted')
  task.spec = write_spec(task)
  set(task, 'spec', task.spec)
  set(task, 'request', request)
  enqueue(task)
  record(task, 'submitted', { text = key, number = #request, actor = actor })
  sort(task)
  if idempotency ~= '' then WRITES[#WRITES + 1] = { 'SET', IDEMPOTENCY .. idempotency, digest .. ' ' .. id } end
  return { 'new', id, whole(WALL_US) }
end

-- -> status, state, agent, attempt, fence, cancel grace (ms)
local function task_reply(status, task)
  if not task then return { status, '0', '', '0', '0', '0' } end
  return { status, VISIBLE[task.state], task.agent_id, whole(task.attempt), task.fence, whole(options(task).grace) }
end

-- id, message, actor -> unknown | ended | done (it was not started) | requested | repeated
OPS.cancel = function(a)
  local task = load(a[1])
  if not task then return task_reply('unknown') end
  if MOVES[task.state].Forgotten then return task_reply('ended', task) end
  if not MOVES[task.state].CancelRequested then
    post_cancel(task, a[2])
    return task_reply('repeated', task)
  end
  move(task, 'CancelRequested')
  record(task, 'cancel_requested', { text = a[2], actor = a[3] })
  if task.state == 'CANCELLED' then
    finish_cancelled(task, REASON_CANCELLED, a[2] ~= '' and a[2] or 'the task was cancelled')
    return task_reply('done', task)
  end
  post_cancel(task, a[2])
  return task_reply('requested', task)
end

-- id, size of the directive, actor, fence of the attempt -> unknown | ended | idle | running
OPS.direct = function(a)
  local task = load(a[1])
  if not task then return task_reply('unknown') end
  if MOVES[task.state].Forgotten then return task_reply('ended', task) end
  if not MOVES[task.state].Directed or task.fence ~= a[4] then return task_reply('idle', task) end
  move(task, 'Directed')
  record(task, 'directed', { number = tonumber(a[2]), actor = a[3] })
  return task_reply('running', task)
end

-- id, maximum number of progress entries, cursor ("" for the beginning), maximum size of the response, if there is one
-- -> nothing for an unknown task; `large` if the response is larger; else the fields of SNAPSHOT, then cursor, attempt, index, payload, number and dropped
--    of each entry
OPS.read = function(a)
  if not load(a[1]) then return {} end
  flush()
  if a[4] and redis.call('HSTRLEN', TASK .. a[1], 'response') > tonumber(a[4]) then return { 'large' } end
  local values = redis.call('HMGET', TASK .. a[1], unpack(SNAPSHOT))
  for at = 1, #SNAPSHOT do values[at] = values[at] or '' end
  if a[2] ~= '0' then
    local from = a[3] == '' and '-' or '(' .. a[3]
    for _, entry in ipairs(redis.call('XRANGE', PROGRESS .. a[1], from, '+', 'COUNT', a[2])) do
      local fields = entry[2]
      -- Entries of an older version have no number.
      for _, value in ipairs({ entry[1], fields[2], fields[4], fields[6], fields[8] or '0', fields[10] or '' }) do
        values[#values + 1] = value
      end
    end
  end
  return values
end

-- --- reports of agents: only the holder of the current fence changes anything, everybody else gets `stale` ---

-- -> accepted | repeated | stale, state afterwards, wait before the next attempt (ms; -1 for none), revision, time (us),
-- method if another attempt follows
local function report_reply(status, task, wait)
  return {
    status, task and VISIBLE[task.state] or '0', whole(wait or -1), whole(task and task.revision or 0), WALL_TEXT,
    wait and task.method or '',
  }
end

-- The task if the agent holds its attempt, and nil; or nil and the reply to a report that was accepted before or is stale.
local function reporting(a)
  local task, other = held(a[1], a[2], a[3])
  local known = task or other
  if known and known.result_fence == a[2] and known.result_agent == a[3] then
    return nil, report_reply('repeated', known)
  end
  return task, report_reply('stale')
end

-- id, fence, agent
OPS.accept = function(a)
  local task = held(a[1], a[2], a[3])
  if not task then return report_reply('stale') end
  if not MOVES[task.state].Started then return report_reply('repeated', task) end
  move(task, 'Started')
  begin(task)
  sort(task)
  return report_reply('accepted', task)
end

-- id, fence, agent, reason, message, "1" to offer it again at once
OPS.decline = function(a)
  local task = held(a[1], a[2], a[3])
  if not task or not MOVES[task.state].OfferDeclined then return report_reply('stale') end
  return report_reply('accepted', task, end_offer(task, 'OfferDeclined', a[4], a[5], a[6] == '1'))
end

-- id, fence, agent: the offer was sent, and its session ended without an answer
OPS.suspect = function(a)
  local task = held(a[1], a[2], a[3])
  if not task or not MOVES[task.state].OfferSuspected then return report_reply('stale') end
  if task.suspected == '1' then return report_reply('repeated', task) end
  move(task, 'OfferSuspected')
  heard(task)
  task.suspected, task.offer_due = '1', NOW + options(task).heartbeat
  sort(task)
  return report_reply('accepted', task)
end

-- id, fence, agent, message: the process that got the offer is gone
OPS.lose = function(a)
  local task = held(a[1], a[2], a[3])
  if not task or not MOVES[task.state].OfferLost then return report_reply('stale') end
  return report_reply('accepted', task, end_attempt(task, 'OfferLost', REASON_LEASE_EXPIRED, a[4], '', true))
end

-- id, fence, agent, number of entries kept, index, payload, number of deltas before it that may be missing, "1" if it
-- was dropped itself
-- -> accepted | repeated | gap (deltas before it are missing) | stale, state afterwards, index of the last delta
OPS.progress = function(a)
  local task, reply = reporting(a)
  if not task then return { reply[1], reply[2], a[5] } end
  local index = tonumber(a[5])
  local missing = index - task.progress_index - 1
  local status = missing < 0 and 'repeated' or missing > tonumber(a[7]) and 'gap'
  if status then return { status, VISIBLE[task.state], whole(task.progress_index) } end
  -- A full store takes the end of a gap: it is small, and the task's result follows and frees memory.
  if a[8] ~= '1' then refuse_if_full() end
  typed(PROGRESS .. task.id, 'stream')
  move(task, 'Progressed')
  task.progress_index, task.progress_number = index, task.progress_number + missing + 1
  local entry = { 'XADD', PROGRESS .. task.id, 'MAXLEN', '~', a[4], '*', 'attempt', whole(task.attempt), 'index', a[5],
    'payload', a[6], 'number', whole(task.progress_number) }
  if a[8] == '1' then entry[#entry + 1], entry[#entry + 2] = 'dropped', '1' end
  WRITES[#WRITES + 1] = entry
  local began = begin(task)
  heard(task)
  if task.stall_due > 0 then task.stall_due = NOW + options(task).stall end
  sort(task, not began)
  return { 'accepted', VISIBLE[task.state], a[5] }
end

-- agent, then id and fence of each attempt
-- -> number of stale ones, their positions (from 0), then position and cancel grace (ms) of each whose agent has not
--    acknowledged a cancel
OPS.renew = function(a)
  local stale, cancelling = {}, {}
  for at = 2, #a, 2 do
    local task = held_of_several(a[at], a[at + 1], a[1])
    if not task then
      stale[#stale + 1] = whole(at / 2 - 1)
    elseif MOVES[task.state].Renewed then
      move(task, 'Renewed')
      heard(task)
      task.lease_due = NOW + options(task).heartbeat
      sort(task, true)
    end
    if task and task.state == 'CANCELLING' and task.cancel_acknowledged ~= '1' then
      cancelling[#cancelling + 1], cancelling[#cancelling + 2] = whole(at / 2 - 1), whole(options(task).grace)
    end
  end
  local reply = { whole(#stale), unpack(stale) }
  for _, value in ipairs(cancelling) do reply[#reply + 1] = value end
  return reply
end

-- id, fence, agent, response
OPS.succeed = function(a)
  local task, reply = reporting(a)
  if not task then return reply end
  move(task, 'AttemptSucceeded')
  begin(task)
  task.result_fence, task.result_agent = a[2], a[3]
  set(task, 'response', a[4])
  record(task, 'succeeded', { number = #a[4] })
  finish(task)
  return report_reply('accepted', task)
end

-- id, fence, agent, reason, message, error type, "1" if another attempt may help
OPS.fail = function(a)
  local task, reply = reporting(a)
  if not task then return reply end
  touch(task)
  task.result_fence, task.result_agent = a[2], a[3]
  if a[4] == REASON_ABANDONED then return report_reply('accepted', task, abandon(task, a[4], a[5])) end
  return report_reply('accepted', task, end_attempt(task, 'AttemptFailed', a[4], a[5], a[6], a[7] == '1'))
end

-- id, fence, agent, reason
OPS.cancelled = function(a)
  local task, reply = reporting(a)
  if not task then return reply end
  move(task, 'AttemptCancelled')
  task.result_fence, task.result_agent = a[2], a[3]
  finish_cancelled(task, a[4], 'the task was cancelled')
  return report_reply('accepted', task)
end

-- id, fence, agent
OPS.acknowledge_cancel = function(a)
  local task = held(a[1], a[2], a[3])
  if not task or not MOVES[task.state].CancelAcknowledged then return report_reply('stale') end
  if task.cancel_acknowledged == '1' then return report_reply('repeated', task) end
  move(task, 'CancelAcknowledged')
  task.cancel_acknowledged = '1'
  record(task, 'cancel_acknowledged')
  return report_reply('accepted', task)
end

-- agent, then id and fence of each attempt that the agent holds
-- -> for each: attempt's traceparent ("" if it is not the agent's), state, cancel grace (ms)
OPS.resume = function(a)
  local resumed = {}
  for at = 2, #a, 2 do
    local task, other = held_of_several(a[at], a[at + 1], a[1])
    if task then
      move(task, MOVES[task.state].Started and 'Started' or 'Renewed')
      begin(task)
      heard(task)
      task.lease_due = NOW + options(task).heartbeat
      sort(task)
    elseif other and other.result_fence == a[at + 1] and other.result_agent == a[1] then
      task = other
    end
    resumed[#resumed + 1] = task and attempt_traceparent(task) or ''
    resumed[#resumed + 1] = task and VISIBLE[task.state] or '0'
    resumed[#resumed + 1] = task and whole(options(task).grace) or '0'
  end
  return resumed
end
