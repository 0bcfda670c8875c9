-- submit: a task comes into being, or is found by its idempotency key.
--
-- Sending the same submission again (same task id) changes nothing, so an answer that was lost may be asked for again.
-- -> new | same | conflict, task id, submitted (us)
OPS.submit = function(a)
  local id, method, request, opts, digest, key_digest, key, tp, tu, actor, contract = unpack(a)
  if redis.call('EXISTS', TASK .. id) == 1 then return { 'new', id, redis.call('HGET', TASK .. id, 'su') } end
  if key_digest ~= '' then
    local found = redis.call('GET', IDEMPOTENCY .. key_digest)
    local other = found and string.sub(found, 66)
    if found and redis.call('EXISTS', TASK .. other) == 1 then
      return { string.sub(found, 1, 64) == digest and 'same' or 'conflict', other, '0' }
    end
    redis.call('SET', IDEMPOTENCY .. key_digest, digest .. ' ' .. id)
  end
  local task = { id = id, s = QUEUED, m = method, o = opts, n = 0, k = key_digest, a = 0, f = '0', g = '', i = '',
    tp = tp, tu = tu, ap = '', rf = '', rg = '', lo = 0, le = 0, la = 0, ls = 0, lt = 0, lr = 0, lf = 0,
    h = contract }
  local total = options(task).total
  if total > 0 then task.lt = NOW + total end
  redis.call('HSET', TASK .. id, 'q', request, 'm', method, 'o', opts, 'k', key_digest, 'tp', tp, 'tu', tu,
    'su', whole(NOW_US), 'a', '0', 'f', '0', 'c', '0', 'd', '0', 'h', contract)
  redis.call('ZADD', INDEX, whole(NOW_US), id)
  redis.call('ZADD', QUEUE .. method, whole(NOW_US), id)
  count_open(task, 1)
  record(task, 'submitted', { text = key, number = #request, actor = actor })
  save(task, 's', 'n', 'lt')
  return { 'new', id, whole(NOW_US) }
end

-- What submitters ask of running tasks.
-- -> word, state, agent, attempt, fence, attempt's traceparent, cancel grace (ms)

local function answer(word, task)
  if not task then return { word, '0', '', '0', '0', '', '0' } end
  return { word, task.s, task.g, whole(task.a), task.f, task.ap, whole(options(task).grace) }
end

-- id, message, actor -> unknown | ended | done (it had not been started) | asked | again
OPS.cancel = function(a)
  local task = load(a[1])
  if not task then return answer('unknown') end
  if ended(task) then return answer('ended', task) end
  if task.s == CANCELLING then return answer('again', task) end
  record(task, 'cancel_requested', { text = a[2], actor = a[3] })
  if task.s == QUEUED then
    end_as_cancelled(task, REASON_CANCELLED, a[2] ~= '' and a[2] or 'the task was cancelled')
    return answer('done', task)
  end
  task.s = CANCELLING
  save(task, 's', 'n')
  return answer('asked', task)
end

-- id, size of the directive, actor, fence that the directive is meant for -> unknown | ended | idle | running
OPS.direct = function(a)
  local task = load(a[1])
  if not task then return answer('unknown') end
  if ended(task) then return answer('ended', task) end
  if task.s ~= RUNNING or task.f ~= a[4] then return answer('idle', task) end
  record(task, 'directed', { number = tonumber(a[2]), actor = a[3] })
  save(task, 'n')
  return answer('running', task)
end

-- offer: hands queued tasks to those who ask, one to each in turn until nobody wants or has more.
--
-- Arguments: accept timeout (ms), then for each asker: agent, instance, how many, number of methods, the methods.
-- An asker takes the longest queued task among its methods. Attempt and fence rise here and nowhere else.
-- -> for each offer nine values: asker (from 0), task, attempt, fence, method, request, attempt's traceparent, lease (ms),
--    attempt timeout (ms)

local function next_fence()
  -- GET, since INCR's reply becomes a Lua number, which is not exact above 2^53.
  if redis.call('EXISTS', FENCE) == 0 then redis.call('SET', FENCE, FIRST_FENCE(NOW)) end
  redis.call('INCR', FENCE)
  return redis.call('GET', FENCE)
end

local function pop(methods, empty)
  local best, score
  for _, method in ipairs(methods) do
    if not empty[method] then
      local head = redis.call('ZRANGE', QUEUE .. method, 0, 0, 'WITHSCORES')
      if not head[1] then
        empty[method] = true
      elseif not score or tonumber(head[2]) < score then
        best, score = { head[1], method }, tonumber(head[2])
      end
    end
  end
  if best then redis.call('ZREM', QUEUE .. best[2], best[1]) end
  return best and best[1]
end

local function offer_to(task, asker, accept_timeout)
  task.a = task.a + 1
  task.f, task.g, task.i = next_fence(), asker.agent, asker.instance
  task.ap = string.sub(task.tp, 1, 36) .. string.sub(redis.sha1hex(task.id .. '/' .. task.a), 1, 16)
    .. string.sub(task.tp, 53)
  task.s, task.lo, task.pi, task.ca = OFFERED, NOW + accept_timeout, 0, ''
  record(task, 'offered', {})
  save(task, 's', 'n', 'a', 'f', 'g', 'i', 'ap', 'lo', 'pi', 'ca')
end

OPS.offer = function(a)
  local askers, at = {}, 2
  while at <= #a do
    local asker = { agent = a[at], instance = a[at + 1], wants = tonumber(a[at + 2]), methods = {} }
    local count = tonumber(a[at + 3])
    for offset = 1, count do asker.methods[offset] = a[at + 3 + offset] end
    askers[#askers + 1], at = asker, at + 4 + count
  end
  local offers, empty, going = {}, {}, true
  while going do
    going = false
    for number, asker in ipairs(askers) do
      local id = asker.wants > 0 and pop(asker.methods, empty)
      local task = id and load(id)
      if id then going = true end
      if task and task.s == QUEUED then
        offer_to(task, asker, tonumber(a[1]))
        asker.wants = asker.wants - 1
        local o = options(task)
        for _, value in ipairs({ whole(number - 1), id, whole(task.a), task.f, task.m,
          redis.call('HGET', TASK .. id, 'q'), task.ap, whole(o.heartbeat), whole(o.attempt) })
        do
          offers[#offers + 1] = value
        end
      end
    end
  end
  return offers
end

-- What agents report about their attempts. Only the holder of the current fence changes anything; everybody else is told
-- `stale`, whether the task is another's, was another's, or never was.
-- -> accepted | repeated | stale, state afterwards, wait before the next attempt (ms; -1 for none)

local function verdict(word, task, wait)
  return { word, task and task.s or '0', whole(wait or -1) }
end

OPS.accept = function(a)
  local task = held(a[1], a[2], a[3])
  if not task then return verdict('stale') end
  return verdict(start(task) and 'accepted' or 'repeated', task)
end

-- id, fence, agent, reason, message, "1" to offer it again at once
OPS.decline = function(a)
  local task = held(a[1], a[2], a[3])
  if not task or task.lo == 0 then return verdict('stale') end
  return verdict('accepted', task, offer_failed(task, a[4], a[5], a[6] == '1'))
end

-- id, fence, agent, most entries kept, index, payload
OPS.progress = function(a)
  local task = held(a[1], a[2], a[3])
  if not task then return verdict('stale') end
  local index = tonumber(a[5])
  if index <= task.pi then return verdict('repeated', task) end
  start(task)
  redis.call('XADD', PROGRESS .. task.id, 'MAXLEN', '~', a[4], '*', 'a', whole(task.a), 'n', a[5], 'd', a[6])
  task.pi = index
  if task.ls > 0 then task.ls = NOW + options(task).stall end
  -- No save(): a stall timer only moves away, and the sweep looks again when the old one is due.
  redis.call('HSET', TASK .. task.id, 'pi', a[5], 'ls', whole(task.ls))
  return verdict('accepted', task)
end

-- agent, then id and fence of each attempt -> numbers (from 0) of those that are stale
OPS.renew = function(a)
  local stale = {}
  for at = 2, #a, 2 do
    local task = held(a[at], a[at + 1], a[1])
    if task then
      -- An offer that waits for its answer has no lease yet: a heartbeat is no answer.
      if task.lo == 0 then redis.call('HSET', TASK .. task.id, 'le', whole(NOW + options(task).heartbeat)) end
    else
      stale[#stale + 1] = whole(at / 2 - 1)
    end
  end
  return stale
end

-- A result that was accepted before is accepted again in words only.
local function repeated(task, fence, agent) return task and task.rf == fence and task.rg == agent end

-- id, fence, agent, response
OPS.succeed = function(a)
  local task, other = held(a[1], a[2], a[3])
  if repeated(other or task, a[2], a[3]) then return verdict('repeated', other or task) end
  if not task then return verdict('stale') end
  start(task)
  task.rf, task.rg = a[2], a[3]
  redis.call('HSET', TASK .. task.id, 'r', a[4])
  record(task, 'succeeded', { number = #a[4] })
  finish(task, SUCCEEDED)
  return verdict('accepted', task)
end

-- id, fence, agent, reason, message, error type, "1" when another attempt may help
OPS.fail = function(a)
  local task, other = held(a[1], a[2], a[3])
  if repeated(other or task, a[2], a[3]) then return verdict('repeated', other or task) end
  if not task then return verdict('stale') end
  start(task)
  task.rf, task.rg = a[2], a[3]
  return verdict('accepted', task, attempt_failed(task, a[4], a[5], a[6], a[7] == '1'))
end

-- id, fence, agent, reason
OPS.cancelled = function(a)
  local task, other = held(a[1], a[2], a[3])
  if repeated(other or task, a[2], a[3]) then return verdict('repeated', other or task) end
  if not task then return verdict('stale') end
  task.rf, task.rg = a[2], a[3]
  end_as_cancelled(task, a[4], 'the task was cancelled')
  return verdict('accepted', task)
end

-- id, fence, agent
OPS.cancel_acknowledged = function(a)
  local task = held(a[1], a[2], a[3])
  if not task or task.s ~= CANCELLING then return verdict('stale') end
  if task.ca == '1' then return verdict('repeated', task) end
  task.ca = '1'
  record(task, 'cancel_acknowledged', {})
  save(task, 'n', 'ca')
  return verdict('accepted', task)
end

-- agent, then id and fence of each attempt that the agent holds
-- -> for each: attempt's traceparent or "" when it is not the agent's (any more), state, cancel grace (ms)
OPS.attach = function(a)
  local kept = {}
  for at = 2, #a, 2 do
    local task, other = held(a[at], a[at + 1], a[1])
    local mine = task or (repeated(other, a[at + 1], a[1]) and other)
    if task then
      start(task)
      task.le = NOW + options(task).heartbeat
      save(task, 'le')
    end
    kept[#kept + 1] = mine and mine.ap or ''
    kept[#kept + 1] = mine and mine.s or '0'
    kept[#kept + 1] = mine and whole(options(mine).grace) or '0'
  end
  return kept
end

-- sweep: does what timers say. Argument: most tasks to look at.
--
-- -> time until the next timer (ms; -1 for none), then for each task that changed six values: what (offer, attempt, task,
--    retry), task, agent, attempt, fence, reason

local function seconds(ms) return string.format('%g s', ms / 1000) end

local function expire(task)
  local o = options(task)
  if task.lt > 0 and task.lt <= NOW then
    if task.s == CANCELLING then
      end_as_cancelled(task, REASON_CANCELLED, 'the task was cancelled; it ran into its total timeout')
    else
      end_as_failed(task, REASON_TOTAL_TIMEOUT, 'the task did not end within its total timeout of ' .. seconds(o.total), '')
    end
    return 'task', REASON_TOTAL_TIMEOUT
  elseif task.lr > 0 and task.lr <= NOW then
    task.lr = 0
    redis.call('ZADD', QUEUE .. task.m, whole(NOW_US), task.id)
    save(task, 'lr')
    return 'retry', '0'
  elseif task.lo > 0 and task.lo <= NOW then
    offer_failed(task, REASON_OFFER_TIMEOUT, 'agent "' .. task.g .. '" did not answer the offer in time', true)
    return 'offer', REASON_OFFER_TIMEOUT
  elseif task.la > 0 and task.la <= NOW then
    attempt_failed(task, REASON_ATTEMPT_TIMEOUT, 'the attempt on agent "' .. task.g
      .. '" did not end within its timeout of ' .. seconds(o.attempt), '', true)
    return 'attempt', REASON_ATTEMPT_TIMEOUT
  elseif task.le > 0 and task.le <= NOW then
    attempt_failed(task, REASON_LEASE_EXPIRED, 'agent "' .. task.g .. '" was not heard of for ' .. seconds(o.heartbeat),
      '', true)
    return 'attempt', REASON_LEASE_EXPIRED
  elseif task.ls > 0 and task.ls <= NOW then
    attempt_failed(task, REASON_STALLED, 'the attempt on agent "' .. task.g .. '" made no progress for '
      .. seconds(o.stall), '', true)
    return 'attempt', REASON_STALLED
  end
  save(task, 'le') -- A timer has moved away since: only the place in `due` is old.
  return nil
end

OPS.sweep = function(a)
  local result = { '-1' }
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DUE, '-inf', whole(NOW), 'LIMIT', '0', a[1])) do
    local task = load(id)
    if not task or (task.lf > 0 and task.lf <= NOW) then
      redis.call('ZREM', DUE, id)
      redis.call('ZREM', INDEX, id)
      redis.call('DEL', TASK .. id, PROGRESS .. id)
      if task and task.k ~= '' then redis.call('DEL', IDEMPOTENCY .. task.k) end
    else
      local agent, attempt, fence = task.g, task.a, task.f
      local what, reason = expire(task)
      for _, value in ipairs(what and { what, id, agent, whole(attempt), fence, reason } or {}) do
        result[#result + 1] = value
      end
    end
  end
  local next_due = redis.call('ZRANGE', DUE, 0, 0, 'WITHSCORES')
  if next_due[2] then result[1] = whole(math.max(0, tonumber(next_due[2]) - NOW)) end
  return result
end

-- epoch: raises the shard's fence when somebody holds a higher one than the store knows of, which is how a store that has
-- lost its newest writes is recognised. Arguments: the fence that was seen, the first fence of the epoch after it.
-- -> raised | fine, the last fence of the store

local function lower(one, other)
  if #one ~= #other then return #one < #other end
  return one < other
end

OPS.epoch = function(a)
  local last = redis.call('GET', FENCE) or '0'
  if not lower(last, a[1]) then return { 'fine', last } end
  redis.call('SET', FENCE, a[2])
  return { 'raised', a[2] }
end

-- look: a task as it is, and its progress after a cursor, as watchers want them. Reads only.
--
-- Arguments: task, most entries of progress (0 for none), cursor ("" for the beginning).
-- -> nothing for an unknown task; else the fields of LOOK, then for each entry its cursor, attempt, index, payload

local LOOK = {
  's', 'm', 'a', 'f', 'g', 'r', 'xc', 'xm', 'xt', 'e', 'su', 'eu', 'tp', 'n',
}

OPS.look = function(a)
  local values = redis.call('HMGET', TASK .. a[1], unpack(LOOK))
  if not values[1] then return {} end
  for at = 1, #LOOK do values[at] = values[at] or '' end
  if a[2] ~= '0' then
    local from = a[3] == '' and '-' or '(' .. a[3]
    -- The state was read before the progress: whoever sees a task's end has seen all that came before it.
    for _, entry in ipairs(redis.call('XRANGE', PROGRESS .. a[1], from, '+', 'COUNT', a[2])) do
      local fields = entry[2]
      for _, value in ipairs({ entry[1], fields[2], fields[4], fields[6] }) do values[#values + 1] = value end
    end
  end
  return values
end

-- Applies the operations in their order. One that fails leaves the others alone and answers {'error', why}.

local replies, at = {}, 1
while at <= #ARGV do
  local count, arguments = tonumber(ARGV[at + 1]), {}
  for offset = 1, count do arguments[offset] = ARGV[at + 1 + offset] end
  local fine, reply = pcall(OPS[ARGV[at]], arguments)
  if not fine then reply = { 'error', type(reply) == 'table' and (reply.err or 'unknown') or tostring(reply) } end
  replies[#replies + 1] = reply
  at = at + 2 + count
end
return replies
