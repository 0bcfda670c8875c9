-- What orchestrators tell each other: queued work.

-- methods -> number of queued tasks of each; a damaged or paused queue has none
OPS.queue_lengths = function(a)
  flush()
  local counts = {}
  for number, method in ipairs(a) do
    local done, count = pcall(redis.call, 'ZCARD', QUEUE .. method)
    if not done and not is_damage(count) then error(count, 0) end
    counts[number] = done and not is_paused(method) and whole(count) or '0'
  end
  return counts
end
