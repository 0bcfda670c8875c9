-- The operations of a shard. Each is described by a class in operations.py or queries.py.

-- --- requests of submitters ---

-- -> new | same | conflict, task id, submitted (us)
OPS.submit = function(a)
  local id, method, request, opts, digest, idempotency, key, traceparent, parent_id, actor, contract = unpack(a)
  local existing = redis.call('HGET', TASK .. id, 'submitted_us')
  if existing then return { 'new', id, existing } end
  if idempotency ~= '' then
    local found = redis.call('GET', IDEMPOTENCY .. idempotency)
    local other = found and string.sub(found, 66)
    if found and redis.call('EXISTS', TASK .. other) == 1 then
      return { string.sub(found, 1, 64) == digest and 'same' or 'conflict', other, '0' }
    end
  end
  local task = build(id, {})
  task.fence = '0'
  task.method, task.options, task.idempotency, task.contract = method, opts, idempotency, contract
  task.traceparent, task.parent_id = traceparent, parent_id
  move(task, 'Submitted')
  if idempotency ~= '' then redis.call('SET', IDEMPOTENCY .. idempotency, digest .. ' ' .. id) end
  local total = options(task).total
  if total > 0 then task.total_due = NOW + total end
  redis.call('HSET', TASK .. id, 'request', request, 'submitted_us', whole(NOW_US))
  redis.call('ZADD', INDEX, whole(NOW_US), id)
  enqueue(task)
  count_open(task, 1)
  record(task, 'submitted', { text = key, number = #request, actor = actor })
  save(task)
  return { 'new', id, whole(NOW_US) }
end

-- -> status, state, agent, attempt, fence, attempt's traceparent, cancel grace (ms)
local function task_reply(status, task)
  if not task then return { status, '0', '', '0', '0', '', '0' } end
  return {
    status, VISIBLE[task.state], task.agent_id, whole(task.attempt), task.fence, task.attempt_traceparent,
    whole(options(task).grace),
  }
end

-- id, message, actor -> unknown | ended | done (it was not started) | requested | repeated
OPS.cancel = function(a)
  local task = load(a[1])
  if not task then return task_reply('unknown') end
  if MOVES[task.state].Forgotten then return task_reply('ended', task) end
  if not MOVES[task.state].CancelRequested then return task_reply('repeated', task) end
  move(task, 'CancelRequested')
  record(task, 'cancel_requested', { text = a[2], actor = a[3] })
  if task.state == 'CANCELLED' then
    finish_cancelled(task, REASON_CANCELLED, a[2] ~= '' and a[2] or 'the task was cancelled')
    return task_reply('done', task)
  end
  save(task)
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
  save(task)
  return task_reply('running', task)
end

-- id, maximum number of progress entries, cursor ("" for the beginning)
-- -> nothing for an unknown task; else the fields of SNAPSHOT, then cursor, attempt, index and payload of each entry
OPS.read = function(a)
  local values = redis.call('HMGET', TASK .. a[1], unpack(SNAPSHOT))
  if not values[1] then return {} end
  for at = 1, #SNAPSHOT do values[at] = values[at] or '' end
  if a[2] ~= '0' then
    local from = a[3] == '' and '-' or '(' .. a[3]
    for _, entry in ipairs(redis.call('XRANGE', PROGRESS .. a[1], from, '+', 'COUNT', a[2])) do
      local fields = entry[2]
      for _, value in ipairs({ entry[1], fields[2], fields[4], fields[6] }) do values[#values + 1] = value end
    end
  end
  return values
end

-- --- reports of agents: only the holder of the current fence changes anything, everybody else gets `stale` ---

-- -> accepted | repeated | stale, state afterwards, wait before the next attempt (ms; -1 for none), revision, time (us)
local function report_reply(status, task, wait)
  return {
    status, task and VISIBLE[task.state] or '0', whole(wait or -1), whole(task and task.revision or 0), whole(NOW_US),
  }
end

-- id, fence, agent
OPS.accept = function(a)
  local task = held(a[1], a[2], a[3])
  if not task then return report_reply('stale') end
  if not MOVES[task.state].Started then return report_reply('repeated', task) end
  move(task, 'Started')
  begin(task)
  save(task)
  return report_reply('accepted', task)
end

-- id, fence, agent, reason, message, "1" to offer it again at once
OPS.decline = function(a)
  local task = held(a[1], a[2], a[3])
  if not task or not MOVES[task.state].OfferDeclined then return report_reply('stale') end
  return report_reply('accepted', task, end_offer(task, 'OfferDeclined', a[4], a[5], a[6] == '1'))
end

-- id, fence, agent, number of entries kept, index, payload
OPS.progress = function(a)
  local task = held(a[1], a[2], a[3])
  if not task then return report_reply('stale') end
  local index = tonumber(a[5])
  if index <= task.progress_index then return report_reply('repeated', task) end
  move(task, 'Progressed')
  redis.call('XADD', PROGRESS .. task.id, 'MAXLEN', '~', a[4], '*', 'attempt', whole(task.attempt), 'index', a[5],
    'payload', a[6])
  task.progress_index = index
  if begin(task) then
    save(task)
  else
    -- The stall timer only moves away, so NEXT_TIMERS may keep the earlier time: the sweep corrects it.
    if task.stall_due > 0 then task.stall_due = NOW + options(task).stall end
    write(task)
  end
  return report_reply('accepted', task)
end

-- agent, then id and fence of each attempt -> positions (from 0) of the stale ones
OPS.renew = function(a)
  local stale = {}
  for at = 2, #a, 2 do
    local task = held(a[at], a[at + 1], a[1])
    if not task then
      stale[#stale + 1] = whole(at / 2 - 1)
    elseif MOVES[task.state].Renewed then
      move(task, 'Renewed')
      task.lease_due = NOW + options(task).heartbeat
      write(task)
    end
  end
  return stale
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

-- id, fence, agent, response
OPS.succeed = function(a)
  local task, reply = reporting(a)
  if not task then return reply end
  move(task, 'AttemptSucceeded')
  begin(task)
  task.result_fence, task.result_agent = a[2], a[3]
  redis.call('HSET', TASK .. task.id, 'response', a[4])
  record(task, 'succeeded', { number = #a[4] })
  finish(task)
  return report_reply('accepted', task)
end

-- id, fence, agent, reason, message, error type, "1" if another attempt may help
OPS.fail = function(a)
  local task, reply = reporting(a)
  if not task then return reply end
  task.result_fence, task.result_agent = a[2], a[3]
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
  record(task, 'cancel_acknowledged', {})
  save(task)
  return report_reply('accepted', task)
end

-- agent, then id and fence of each attempt that the agent holds
-- -> for each: attempt's traceparent ("" if it is not the agent's), state, cancel grace (ms)
OPS.resume = function(a)
  local resumed = {}
  for at = 2, #a, 2 do
    local task, other = held(a[at], a[at + 1], a[1])
    if task then
      move(task, MOVES[task.state].Started and 'Started' or 'Renewed')
      begin(task)
      task.lease_due = NOW + options(task).heartbeat
      save(task)
    elseif other and other.result_fence == a[at + 1] and other.result_agent == a[1] then
      task = other
    end
    resumed[#resumed + 1] = task and task.attempt_traceparent or ''
    resumed[#resumed + 1] = task and VISIBLE[task.state] or '0'
    resumed[#resumed + 1] = task and whole(options(task).grace) or '0'
  end
  return resumed
end

-- --- the orchestrator's own operations ---

local function next_fence()
  -- INCR's reply would become a Lua number, which is not exact above 2^53.
  if redis.call('EXISTS', FENCE) == 0 then redis.call('SET', FENCE, first_fence(NOW)) end
  redis.call('INCR', FENCE)
  return redis.call('GET', FENCE)
end

-- Takes the longest queued task of these methods from its queue.
local function pop(methods, empty)
  local best, method, score
  for _, each in ipairs(methods) do
    if not empty[each] then
      local head = redis.call('ZRANGE', QUEUE .. each, 0, 0, 'WITHSCORES')
      if not head[1] then
        empty[each] = true
      elseif not score or tonumber(head[2]) < score then
        best, method, score = head[1], each, tonumber(head[2])
      end
    end
  end
  if best then redis.call('ZREM', QUEUE .. method, best) end
  return best
end

local function offer_to(task, recipient, accept_timeout)
  move(task, 'Offered')
  task.attempt = task.attempt + 1
  task.fence, task.agent_id, task.instance_id = next_fence(), recipient.agent_id, recipient.instance_id
  task.attempt_traceparent = string.sub(task.traceparent, 1, 36)
    .. string.sub(redis.sha1hex(task.id .. '/' .. task.attempt), 1, 16) .. string.sub(task.traceparent, 53)
  task.offer_due, task.progress_index, task.cancel_acknowledged = NOW + accept_timeout, 0, ''
  record(task, 'offered', {})
  save(task)
end

-- accept timeout (ms), then for each recipient: agent, instance, slots, number of methods, methods
-- -> for each offer: position of the recipient (from 0), task, attempt, fence, method, request, attempt's traceparent,
--    lease (ms), attempt timeout (ms)
OPS.offer = function(a)
  local recipients, at = {}, 2
  while at <= #a do
    local recipient = { agent_id = a[at], instance_id = a[at + 1], slots = tonumber(a[at + 2]), methods = {} }
    local count = tonumber(a[at + 3])
    for offset = 1, count do recipient.methods[offset] = a[at + 3 + offset] end
    recipients[#recipients + 1], at = recipient, at + 4 + count
  end
  local offers, empty, found = {}, {}, true
  -- One task for each recipient in turn, until no recipient has slots left or no task fits.
  while found do
    found = false
    for number, recipient in ipairs(recipients) do
      local id = recipient.slots > 0 and pop(recipient.methods, empty)
      local task = id and load(id)
      if id then found = true end
      if task and MOVES[task.state].Offered then
        offer_to(task, recipient, tonumber(a[1]))
        recipient.slots = recipient.slots - 1
        local o = options(task)
        for _, value in ipairs({ whole(number - 1), id, whole(task.attempt), task.fence, task.method,
          redis.call('HGET', TASK .. id, 'request'), task.attempt_traceparent, whole(o.heartbeat), whole(o.attempt) })
        do
          offers[#offers + 1] = value
        end
      end
    end
  end
  return offers
end

local function seconds(ms) return string.format('%g s', ms / 1000) end

local function agent(task) return 'agent "' .. task.agent_id .. '"' end

-- The effect of each timer; returns kind and reason for the reply.
local EXPIRE = {
  TotalTimedOut = function(task, o)
    move(task, 'TotalTimedOut')
    if task.state == 'CANCELLED' then
      finish_cancelled(task, REASON_CANCELLED, 'the task was cancelled; its total timeout passed')
    else
      finish_failed(task, REASON_TOTAL_TIMEOUT, 'the task did not end within its total timeout of ' .. seconds(o.total), '')
    end
    return 'task', REASON_TOTAL_TIMEOUT
  end,
  RetryDue = function(task)
    move(task, 'RetryDue')
    task.retry_due = 0
    enqueue(task)
    save(task)
    return 'retry', '0'
  end,
  OfferTimedOut = function(task)
    end_offer(task, 'OfferTimedOut', REASON_OFFER_TIMEOUT, agent(task) .. ' did not answer the offer in time', true)
    return 'offer', REASON_OFFER_TIMEOUT
  end,
  AttemptTimedOut = function(task, o)
    end_attempt(task, 'AttemptTimedOut', REASON_ATTEMPT_TIMEOUT, 'the attempt on ' .. agent(task)
      .. ' did not end within its timeout of ' .. seconds(o.attempt), '', true)
    return 'attempt', REASON_ATTEMPT_TIMEOUT
  end,
  LeaseExpired = function(task, o)
    end_attempt(task, 'LeaseExpired', REASON_LEASE_EXPIRED, agent(task) .. ' sent no heartbeat for ' .. seconds(o.heartbeat),
      '', true)
    return 'attempt', REASON_LEASE_EXPIRED
  end,
  Stalled = function(task, o)
    end_attempt(task, 'Stalled', REASON_STALLED, 'the attempt on ' .. agent(task) .. ' made no progress for '
      .. seconds(o.stall), '', true)
    return 'attempt', REASON_STALLED
  end,
}

local function due_event(task)
  for _, timer in ipairs(TIMERS) do
    local due = task[timer[1]]
    if due > 0 and due <= NOW and MOVES[task.state][timer[2]] then return timer[2] end
  end
end

local function forget(id, task)
  if task then move(task, 'Forgotten') end
  redis.call('ZREM', NEXT_TIMERS, id)
  redis.call('ZREM', INDEX, id)
  redis.call('DEL', TASK .. id, PROGRESS .. id)
  if task and task.idempotency ~= '' then redis.call('DEL', IDEMPOTENCY .. task.idempotency) end
end

-- maximum number of tasks
-- -> time until the next timer (ms; -1 for none), then for each task that changed: kind (offer, attempt, task, retry),
--    task, agent, attempt, fence, reason
OPS.sweep = function(a)
  local result = { '-1' }
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', NEXT_TIMERS, '-inf', whole(NOW), 'LIMIT', '0', a[1])) do
    local task = load(id)
    local event = task and due_event(task)
    if not task or event == 'Forgotten' then
      forget(id, task)
    elseif event then
      local agent_id, attempt, fence = task.agent_id, task.attempt, task.fence
      local kind, reason = EXPIRE[event](task, options(task))
      for _, value in ipairs({ kind, id, agent_id, whole(attempt), fence, reason }) do result[#result + 1] = value end
    else
      save(task) -- The timer has moved away; NEXT_TIMERS is out of date.
    end
  end
  local next_timer = redis.call('ZRANGE', NEXT_TIMERS, 0, 0, 'WITHSCORES')
  if next_timer[2] then result[1] = whole(math.max(0, tonumber(next_timer[2]) - NOW)) end
  return result
end

local function is_lower(fence, other)
  if #fence ~= #other then return #fence < #other end
  return fence < other
end

-- a fence that an agent holds, the first fence of the epoch after it -> raised | current, the store's last fence
OPS.raise_epoch = function(a)
  local last = redis.call('GET', FENCE) or '0'
  if not is_lower(last, a[1]) then return { 'current', last } end
  redis.call('SET', FENCE, a[2])
  return { 'raised', a[2] }
end

-- --- the batch: an operation that fails leaves the others alone and replies {'error', message} ---

local replies, at = {}, 1
while at <= #ARGV do
  local count, arguments = tonumber(ARGV[at + 1]), {}
  for offset = 1, count do arguments[offset] = ARGV[at + 1 + offset] end
  local done, reply = pcall(OPS[ARGV[at]], arguments)
  if not done then reply = { 'error', type(reply) == 'table' and (reply.err or 'unknown') or tostring(reply) } end
  replies[#replies + 1] = reply
  at = at + 2 + count
end
return replies
