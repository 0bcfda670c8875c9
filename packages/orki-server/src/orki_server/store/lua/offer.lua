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
