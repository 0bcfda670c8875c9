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
