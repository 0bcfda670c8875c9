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
