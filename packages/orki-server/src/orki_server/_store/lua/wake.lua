-- What orchestrators tell each other: queued work.

local MANY = 1000000

-- methods -> number of queued tasks of each; a damaged or paused queue has none
OPS.queue_lengths = function(a)
  flush()
  local counts, found = {}, {}
  local lanes = lanes_by_method(found)
  for number, method in ipairs(a) do
    local done, count = pcall(redis.call, 'ZCARD', QUEUE .. method)
    if not done and not is_damage(count) then error(count, 0) end
    count = done and count or 0
    for _, queue in ipairs(lanes[method] or NOTHING) do
      -- Only some agents may take these tasks, so that all are asked.
      if count < MANY and redis.call('EXISTS', queue.key) == 1 then count = MANY end
    end
    counts[number] = is_paused(method) and '0' or whole(count)
  end
  return counts
end
