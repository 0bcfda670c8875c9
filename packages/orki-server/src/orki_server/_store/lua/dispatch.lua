-- The orchestrator's own operations: offers, timers, fences; and the loop over the batch.

-- Blocks of their own: Lua allows 200 local variables at a time.

-- --- fences ---

do

-- Whether a text is a fence that Redis and the agents can hold, with room for more.
local function is_fence(text) return string.find(text, '^[1-9]%d*$') ~= nil and #text <= 18 end

-- Returns the fence after this one. Fences exceed Lua's exact numbers, so the last nine digits are added on their own.
local function after(fence)
  local head, tail = string.sub(fence, 1, -10), string.sub(fence, -9)
  local low = tonumber(tail) + 1
  if #tail < 9 or low < 1000000000 then return head .. string.format('%0' .. #tail .. '.0f', low) end
  return whole((tonumber(head) or 0) + 1) .. '000000000'
end

local function is_lower(fence, other)
  if #fence ~= #other then return #fence < #other end
  return fence < other
end

local function last_fence()
  local fence = redis.call('GET', FENCE) or first_fence(WALL_US / 1000)
  if not is_fence(fence) then damaged('key ' .. FENCE .. ' holds no fence') end
  return fence
end

-- a fence that an agent holds, the first fence of the epoch after it -> raised | current | refused, the store's last fence
OPS.raise_epoch = function(a)
  local stored = redis.call('GET', FENCE) or '0'
  if not is_lower(stored, a[1]) then return { 'current', stored } end
  if not is_fence(a[1]) or not is_fence(a[2]) then return { 'refused', stored } end
  WRITES[#WRITES + 1] = { 'SET', FENCE, a[2] }
  return { 'raised', a[2] }
end

-- --- offers ---

local function offer_to(task, recipient, fence, accept_timeout)
  move(task, 'Offered')
  task.attempt = task.attempt + 1
  task.fence, task.agent_id, task.instance_id = fence, recipient.agent_id, recipient.instance_id
  task.offer_due, task.progress_index, task.cancel_acknowledged = NOW + accept_timeout, 0, ''
  task.suspected, task.host, task.absent, task.excused = '', CALLER, ABSENT.own, ''
  record(task, 'offered')
  sort(task)
end

local function read_recipients(a)
  local recipients, slots, at = {}, 0, 2
  while at <= #a do
    local recipient = { agent_id = a[at], instance_id = a[at + 1], slots = tonumber(a[at + 2]), methods = {}, labels = {} }
    local count, labels = tonumber(a[at + 3]), tonumber(a[at + 4])
    for offset = 1, count do recipient.methods[offset] = a[at + 4 + offset] end
    for offset = 1, labels do recipient.labels[a[at + 4 + count + offset]] = true end
    slots = slots + recipient.slots
    recipients[#recipients + 1], at = recipient, at + 5 + count + labels
  end
  return recipients, slots
end

-- One task for each recipient in turn, until no recipient has slots left or no task fits.
local function assign(recipients, accept_timeout, damage)
  local assigned, fence, found = {}, nil, true
  while found do
    found = false
    for number, recipient in ipairs(recipients) do
      local task = recipient.slots > 0 and #assigned < MAX_OFFERS and pop(recipient.queues, damage)
      if task then
        found = true
        fence = after(fence or last_fence())
        offer_to(task, recipient, fence, accept_timeout)
        recipient.slots = recipient.slots - 1
        assigned[#assigned + 1] = { number - 1, task }
      end
    end
  end
  if fence then
    if not is_fence(fence) then damaged('key ' .. FENCE .. ' has no fences left') end
    WRITES[#WRITES + 1] = { 'SET', FENCE, fence }
  end
  return assigned
end

-- accept timeout (ms), then for each recipient: agent, instance, slots, number of methods, number of labels, methods,
-- labels
-- -> time after which limits may admit tasks that are left in lanes (ms; 0 if it depends on agents, -1), number of damaged
--    tasks and queues, their names, then for each offer: position of the recipient (from 0), task, attempt, fence,
--    method, request, attempt's traceparent, lease (ms), attempt timeout (ms), checkpoint and
--    answer (each "1" and the payload, or ""), budgets that it is charged to
OPS.offer = function(a)
  flush()
  local recipients, slots = read_recipients(a)
  local found = {}
  open_queues(recipients, math.min(slots, MAX_OFFERS), found)
  local assigned = assign(recipients, tonumber(a[1]), found)
  local reply = { whole(write_lanes()), whole(#found), unpack(found) }
  for _, each in ipairs(assigned) do
    local task = each[2]
    local o = options(task)
    local n = #reply
    reply[n + 1], reply[n + 2], reply[n + 3], reply[n + 4] = whole(each[1]), task.id, whole(task.attempt), task.fence
    reply[n + 5], reply[n + 6] = task.method, task.request or redis.call('HGET', TASK .. task.id, 'request') or ''
    reply[n + 7], reply[n + 8], reply[n + 9] = attempt_traceparent(task), whole(o.heartbeat), whole(o.attempt)
    reply[n + 10], reply[n + 11] = offered_checkpoint(task), offered_answer(task)
    reply[n + 12] = more(task).accounts or ''
  end
  return reply
end

end

-- --- timers ---

do

local function seconds(ms) return string.format('%g s', ms / 1000) end

local function agent(task) return 'agent "' .. task.agent_id .. '"' end

-- Judges a timer of an attempt, whose agent was heard by one orchestrator. -> nothing, if the agent is at fault; else the
-- time (ms) of the next judgement, or `unheard` if that orchestrator has missed something since it heard the agent.
-- The agent had to stop the attempt then, as it could not renew the lease, so the attempt is not counted.
local function excuse(task, due)
  if task.excused == '1' then return 'unheard' end
  local missed = absence(task.host) - task.absent
  local last = host_of(task.host).last
  if missed <= 0 and last >= due then return nil end
  task.excused = '1'
  return missed > 0 and NOW + missed or math.max(NOW, last + MAX_STEP) + GRACE
end

-- Ends an attempt whose timer is due, or moves its timers if nobody could hear the agent.
local function expire_attempt(task, event, timer, reason, message)
  local later = excuse(task, task[timer])
  touch(task)
  if later == 'unheard' and task.offer_due > 0 then
    end_offer(task, 'OfferTimedOut', reason, message, true)
    return 'offer', reason
  elseif later == 'unheard' then
    abandon(task, reason, 'the orchestrator of ' .. agent(task) .. ' was not heard of')
    return 'attempt', reason
  elseif later then
    local by = later - task[timer]
    for _, name in ipairs({ 'lease_due', 'attempt_due', 'stall_due', 'offer_due' }) do
      if task[name] > 0 then task[name] = task[name] + by end
    end
    sort(task)
    return nil
  end
  end_attempt(task, event, reason, message, '', true)
  return 'attempt', reason
end

-- The effect of each timer; returns kind and reason for the reply, or nothing if it is not due yet.
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
    local suspended = task.state == 'SUSPENDED'
    move(task, 'RetryDue')
    if suspended then
      remember(task, { overdue = '1' })
      resume(task, { text = 'no answer came in time' })
      return 'retry', '0'
    end
    task.retry_due = 0
    enqueue(task)
    sort(task)
    return 'retry', '0'
  end,
  OfferTimedOut = function(task)
    if task.suspected == '1' then
      return expire_attempt(task, 'OfferLost', 'offer_due', REASON_LEASE_EXPIRED, agent(task)
        .. ' got the offer and was not heard of again')
    end
    end_offer(task, 'OfferTimedOut', REASON_OFFER_TIMEOUT, agent(task) .. ' did not answer the offer in time', true)
    return 'offer', REASON_OFFER_TIMEOUT
  end,
  AttemptTimedOut = function(task, o)
    return expire_attempt(task, 'AttemptTimedOut', 'attempt_due', REASON_ATTEMPT_TIMEOUT, 'the attempt on ' .. agent(task)
      .. ' did not end within its timeout of ' .. seconds(o.attempt))
  end,
  LeaseExpired = function(task, o)
    return expire_attempt(task, 'LeaseExpired', 'lease_due', REASON_LEASE_EXPIRED, agent(task) .. ' sent no heartbeat for '
      .. seconds(o.heartbeat))
  end,
  Stalled = function(task, o)
    return expire_attempt(task, 'Stalled', 'stall_due', REASON_STALLED, 'the attempt on ' .. agent(task)
      .. ' made no progress for ' .. seconds(o.stall))
  end,
}

local function due_event(task)
  for _, timer in ipairs(TIMERS) do
    local due = task[timer[1]]
    if due > 0 and due <= NOW and MOVES[task.state][timer[2]] then return timer[2] end
  end
end

local function forget(task)
  move(task, 'Forgotten')
  task.timer = 0
  WRITES[#WRITES + 1] = { 'DEL', TASK .. task.id, PROGRESS .. task.id, BUDGETS .. task.id }
  if task.idempotency ~= '' then WRITES[#WRITES + 1] = { 'DEL', IDEMPOTENCY .. task.idempotency } end
end

-- Queues delayed tasks whose start has come by the server's clock. `changed` gets them as those that wait for an attempt.
local function start_delayed(limit, found, changed)
  local due = redis.call('ZRANGEBYSCORE', STARTS, '-inf', whole(WALL_US / 1000), 'LIMIT', '0', limit)
  for _, id in ipairs(due) do
    local task = load_listed(STARTS, id, found)
    if task and is_delayed(task) then
      changed(task, EXPIRE.RetryDue(task))
    elseif task then
      WRITES[#WRITES + 1] = { 'ZREM', STARTS, id }
    end
  end
end

-- maximum number of tasks
-- -> time until the next timer (ms; -1 for none), the sum of 1 if there is mail for the caller, 2 if the children of
--    ended parents are to be cancelled and 4 if budgets were raised, number of damaged tasks, their ids, then for each task that changed: kind (offer, attempt, task, retry), task, agent, attempt, fence, reason,
--    method
OPS.sweep = function(a)
  flush()
  local found, expired = {}, {}
  local function changed(task, kind, reason, agent_id, number, fence)
    for _, value in ipairs({ kind, task.id, agent_id or '', whole(number or 0), fence or '0', reason, task.method }) do
      expired[#expired + 1] = value
    end
  end
  if HAS_STARTS then start_delayed(a[1], found, changed) end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', NEXT_TIMERS, '-inf', whole(NOW), 'LIMIT', '0', a[1])) do
    local task = load_listed(NEXT_TIMERS, id, found)
    local event = task and due_event(task)
    if event == 'Forgotten' then
      forget(task)
    elseif event then
      local agent_id, number, fence = task.agent_id, task.attempt, task.fence
      local kind, reason = EXPIRE[event](task, options(task))
      if kind then changed(task, kind, reason, agent_id, number, fence) end
    elseif task then
      touch(task)
      sort(task) -- The timer has moved away.
    end
  end
  local reply = { '-1', whole(redis.call('EXISTS', MAIL .. CALLER) + (STORED.orphans and 2 or 0) + (STORED.raised and 4 or 0)), whole(#found), unpack(found) }
  for at = 1, #expired do reply[#reply + 1] = expired[at] end
  return reply
end

end

-- Time until the next timer (ms), after the sweep has been written.
local function until_next_timer()
  flush()
  local row = redis.call('ZRANGE', NEXT_TIMERS, '0', '0', 'WITHSCORES')
  local wait = row[2] and math.max(0, tonumber(row[2]) - NOW)
  if HAS_STARTS then
    local start = redis.call('ZRANGE', STARTS, '0', '0', 'WITHSCORES')[2]
    if not start then write({ 'HDEL', CLOCK, 'starts' }) end
    local until_start = start and math.max(0, math.ceil(tonumber(start) - WALL_US / 1000))
    if start and (not wait or until_start < wait) then wait = until_start end
  end
  return wait and whole(wait) or '-1'
end

-- --- the outbox ---

-- "1" to give the outbox up -> kept | taken | other: whether the caller is the only one that publishes the outbox now
OPS.drain = function(a)
  local holder = STORED.drainer
  if a[1] == '1' then
    if holder == CALLER then WRITES[#WRITES + 1] = { 'HDEL', CLOCK, 'drainer' } end
    return { 'other' }
  end
  if holder == CALLER then return { 'kept' } end
  if holder and NOW - host_of(holder).last <= 3 * MAX_STEP then return { 'other' } end
  WRITES[#WRITES + 1] = { 'HSET', CLOCK, 'drainer', CALLER }
  return { 'taken' }
end

-- Writes the oldest entries of the outbox as events, at most 32, and removes them.
-- -> moved | empty | stuck (a stream refuses them) | other (the caller does not publish this outbox, or the script writes
--    no events), number of damaged records
OPS.empty_outbox = function()
  if not EVENTS.limits[2] or redis.call('HGET', CLOCK, 'drainer') ~= CALLER then return { 'other', '0' } end
  if not EVENTS.has_streams() then return { 'stuck', '0' } end
  is_full()
  flush()
  local damage, rows = 0, redis.call('XRANGE', OUTBOX, '-', '+', 'COUNT', '32')
  for _, row in ipairs(rows) do
    local before = EVENTS.written()
    for at = 2, #row[2], 2 do
      local fields = EVENTS.split(row[2][at])
      if not fields then
        damage = damage + 1
      elseif not EVENTS.add(fields, true) then
        EVENTS.retract(before)
        return { 'stuck', whole(damage) }
      end
    end
    write({ 'XDEL', OUTBOX, row[1] })
  end
  EVENTS.is_open = nil
  return { rows[1] and 'moved' or 'empty', whole(damage) }
end

-- --- the batch: an operation that fails leaves the others alone and replies {'error', message} ---

local function failure(reply)
  return { 'error', type(reply) == 'table' and (reply.err or 'unknown') or tostring(reply) }
end

local ready, trouble = pcall(read_clock)
local replies, at = {}, 3
while at <= #ARGV do
  local count, arguments = tonumber(ARGV[at + 1]), {}
  for offset = 1, count do arguments[offset] = ARGV[at + 1 + offset] end
  local done, reply = ready, trouble
  if ready then done, reply = attempt(OPS[ARGV[at]], arguments) end
  if done and ARGV[at] == 'sweep' then
    local read, next_timer = pcall(until_next_timer)
    if read then reply[1] = next_timer else done, reply = false, next_timer end
  end
  replies[#replies + 1] = done and reply or failure(reply)
  at = at + 2 + count
end
if ready then
  local done, problem = pcall(function()
    is_full()
    flush()
    write_clock()
    announce()
  end)
  if not done then PROBLEM = problem end
end
if PROBLEM then
  for number = 1, #replies do replies[number] = failure(PROBLEM) end
elseif NEXT_DUE and NEXT_DUE - NOW < SOON then
  -- The sweeps are less frequent.
  replies[#replies + 1] = whole(math.max(0, NEXT_DUE - NOW))
end
return replies
