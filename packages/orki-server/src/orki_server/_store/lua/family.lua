-- Children that end with their parent. A parent knows them before they exist, so that none is forgotten.

-- parent, fence of its attempt, child -> adopted | stale (no such attempt runs) | full
OPS.adopt = function(a)
  local task = load(a[1])
  if not task or task.fence ~= a[2] or not HELD[task.state] then return { 'stale' } end
  local key = CHILDREN .. task.id
  typed(key, 'set')
  if redis.call('SCARD', key) >= 10000 then return { 'full' } end
  refuse_if_full()
  touch(task)
  remember(task, { children = '1' })
  WRITES[#WRITES + 1] = { 'SADD', key, a[3] }
  return { 'adopted' }
end

-- maximum number of parents -> for each that ended: its id, milliseconds since its end, number of children, their ids
OPS.orphans = function(a)
  flush()
  local reply = {}
  typed(ORPHANS, 'zset')
  local parents = redis.call('ZRANGE', ORPHANS, '0', whole(tonumber(a[1]) - 1), 'WITHSCORES')
  for at = 1, #parents, 2 do
    local id, age = parents[at], math.max(0, math.floor((WALL_US - tonumber(parents[at + 1])) / 1000))
    local done, children = pcall(redis.call, 'SMEMBERS', CHILDREN .. id)
    children = done and children or NOTHING
    reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = id, whole(age), whole(#children)
    for _, child in ipairs(children) do reply[#reply + 1] = child end
  end
  if not parents[1] and STORED.orphans then WRITES[#WRITES + 1] = { 'HDEL', CLOCK, 'orphans' } end
  return reply
end

-- parent: all its children were cancelled
OPS.disown = function(a)
  WRITES[#WRITES + 1] = { 'DEL', CHILDREN .. a[1] }
  WRITES[#WRITES + 1] = { 'ZREM', ORPHANS, a[1] }
  return {}
end
