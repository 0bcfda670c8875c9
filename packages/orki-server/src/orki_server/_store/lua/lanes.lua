-- The queues of an offer: from which lanes a recipient may take tasks, in which order, and what limits admit.

-- A block of its own: Lua allows 200 local variables at a time.
local lanes_by_method, open_queues, pop, write_lanes

do
-- Lanes with labels, limits or a fairness key, by method.
function lanes_by_method(found)
  local lanes = {}
  if not HAS_LANES then return lanes end
  local done, names = pcall(redis.call, 'HKEYS', LANES)
  if not done then
    if not is_damage(names) then error(names, 0) end
    found[#found + 1] = LANES
    return lanes
  end
  for _, name in ipairs(names) do
    local method, labels, limits, fairness, priority = string.match(name,
      '^([^\31]*)\31([^\31]*)\31([^\31]*)\31([^\31]*)\31([^\31]*)$')
    if method then
      local list = lanes[method] or {}
      lanes[method], list[#list + 1] = list, { name = name, key = QUEUE .. name, method = method, labels = words(labels),
        limits = words(limits), fairness = fairness, priority = tonumber(priority) }
    end
  end
  if #names == 0 then
    HAS_LANES = false
    WRITES[#WRITES + 1] = { 'HDEL', CLOCK, 'lanes' }
    WRITES[#WRITES + 1] = { 'DEL', TURNS }
  end
  return lanes
end

-- --- limits ---

local LIMIT_STATES = {}

-- Takes a few tasks out of a full limit if they have no attempt: an older version, which knows no limits, may have ended it.
local function drop_stale(key)
  local dropped = 0
  for _, id in ipairs(redis.call('SRANDMEMBER', HOLDERS .. key, '3')) do
    local done, task = pcall(load, id)
    if not done and not is_damage(task) then error(task, 0) end
    if not done or not task or not HELD[task.state] then
      WRITES[#WRITES + 1] = { 'SREM', HOLDERS .. key, id }
      dropped = dropped + 1
    end
  end
  return dropped
end

local function limit_state(key)
  local limit = LIMIT_STATES[key]
  if limit then return limit end
  local concurrency, interval, burst = string.match(redis.call('HGET', LIMITS, key) or '', '^(%d+),(%d+),(%d+)$')
  limit = { concurrency = tonumber(concurrency) or 0, interval = tonumber(interval) or 0, burst = tonumber(burst) or 1 }
  if limit.concurrency > 0 then
    limit.used = redis.call('SCARD', HOLDERS .. key)
    if limit.used >= limit.concurrency then limit.used = limit.used - drop_stale(key) end
  end
  if limit.interval > 0 then limit.due = tonumber(redis.call('HGET', RATES, key) or '0') or 0 end
  LIMIT_STATES[key] = limit
  return limit
end

-- -> nothing if the lane's limits admit a task; else the wait (ms), or 0 if an attempt must end first
local function limited(queue)
  local wait
  for _, key in ipairs(queue.limits) do
    local limit = limit_state(key)
    if limit.concurrency > 0 and limit.used >= limit.concurrency then return 0 end
    if limit.interval > 0 then
      local early = limit.due - (limit.burst - 1) * limit.interval - CLOCK_US
      if early > 0 then wait = math.max(wait or 0, math.ceil(early / 1000)) end
    end
  end
  return wait
end

local function use_limits(queue)
  for _, key in ipairs(queue.limits) do
    local limit = limit_state(key)
    if limit.concurrency > 0 then limit.used = limit.used + 1 end
    if limit.interval > 0 then limit.due, limit.changed = math.max(limit.due, CLOCK_US) + limit.interval, true end
  end
end

-- key, concurrency, microseconds between two starts, burst; 0 for no limit -> "1"
OPS.limit = function(a)
  typed(LIMITS, 'hash')
  typed(RATES, 'hash')
  if a[2] == '0' and a[3] == '0' then
    WRITES[#WRITES + 1] = { 'HDEL', LIMITS, a[1] }
    WRITES[#WRITES + 1] = { 'HDEL', RATES, a[1] }
  else
    WRITES[#WRITES + 1] = { 'HSET', LIMITS, a[1], a[2] .. ',' .. a[3] .. ',' .. a[4] }
    if a[3] == '0' then WRITES[#WRITES + 1] = { 'HDEL', RATES, a[1] } end
  end
  return { '1' }
end

-- -> for each declared limit: key, concurrency, microseconds between two starts, burst, tasks that hold it
OPS.limits = function()
  flush()
  local reply, rows = {}, redis.call('HGETALL', LIMITS)
  for at = 1, #rows, 2 do
    local concurrency, interval, burst = string.match(rows[at + 1], '^(%d+),(%d+),(%d+)$')
    if not concurrency then damaged('limit ' .. rows[at]) end
    for _, value in ipairs({ rows[at], concurrency, interval, burst, whole(redis.call('SCARD', HOLDERS .. rows[at])) }) do
      reply[#reply + 1] = value
    end
  end
  return reply
end

-- --- turns ---
--
-- Where tasks of a method have fairness keys, those of the same priority take turns by key. A key that had no turn for
-- PRIORITY_STEP advances by a priority, so that none waits forever.

local FAIR_METHODS, TURN_TIMES, NEW_TURNS, LAST_TURN = {}, {}, {}, 0

local function turn_key(queue, priority) return queue.method .. '\31' .. queue.fairness .. '\31' .. whole(priority) end

local function read_turns()
  local rows = redis.call('HGETALL', TURNS)
  for at = 1, #rows, 2 do
    TURN_TIMES[rows[at]] = tonumber(rows[at + 1]) or 0
    LAST_TURN = math.max(LAST_TURN, TURN_TIMES[rows[at]])
  end
end

-- Sets priority, level and turn of a queue's first task.
local function rank(queue, score)
  local priority = queue.priority
  if not priority then
    local done, task = pcall(load, queue[queue.next])
    priority = done and task and placement(task).priority or DEFAULT_PRIORITY
  end
  local step = PRIORITY_STEP * 1000000
  queue.turn_key = turn_key(queue, priority)
  queue.turn = TURN_TIMES[queue.turn_key] or 0
  local since = math.max(queue.turn, score + (priority - DEFAULT_PRIORITY) * step)
  queue.level = priority + math.max(0, math.floor((CLOCK_US - since) / step))
end

local function comes_before(queue, rival)
  if queue.level ~= rival.level then return queue.level > rival.level end
  if queue.turn ~= rival.turn then return queue.turn < rival.turn end
  return queue.score < rival.score
end

local function use_turn(queue)
  LAST_TURN = math.max(CLOCK_US, LAST_TURN + 1)
  TURN_TIMES[queue.turn_key], NEW_TURNS[queue.turn_key] = LAST_TURN, LAST_TURN
end

-- --- queues ---

local OPENED, LEFT = {}, false

-- Reads the first tasks of a queue, at most `count`: ids and scores in turn. A damaged queue is empty.
local function open_queue(queue, count, found)
  queue.next = 1
  local done, rows = pcall(redis.call, 'ZRANGE', queue.key, '0', whole(count - 1), 'WITHSCORES')
  if not done then
    if not is_damage(rows) then error(rows, 0) end
    found[#found + 1] = queue.key
    return queue
  end
  for at = 1, #rows do queue[at] = rows[at] end
  return queue
end

-- Removes a lane without tasks, and the turn of its fairness key if no other lane has it.
local function close_lane(queue, lanes)
  WRITES[#WRITES + 1] = { 'HDEL', LANES, queue.name }
  if queue.fairness == '' then return end
  for _, rival in ipairs(lanes) do
    if rival ~= queue and rival.fairness == queue.fairness and rival.priority == queue.priority then return end
  end
  WRITES[#WRITES + 1] = { 'HDEL', TURNS, turn_key(queue, queue.priority) }
end

local function open_lanes(recipient, lanes, count, found)
  for _, queue in ipairs(lanes) do
    local fits = true
    for _, label in ipairs(queue.labels) do fits = fits and recipient.labels[label] end
    if fits and not queue.next then
      open_queue(queue, count, found)
      OPENED[#OPENED + 1] = queue
      if not queue[1] then close_lane(queue, lanes) end
      if queue[1] and queue.fairness ~= '' then FAIR_METHODS[queue.method] = true end
    end
    if fits and queue[1] then recipient.queues[#recipient.queues + 1] = queue end
  end
end

-- Gives each recipient the queues from which it may take tasks.
function open_queues(recipients, count, found)
  local lanes, plain = lanes_by_method(found), {}
  LIMIT_STATES, FAIR_METHODS, TURN_TIMES, NEW_TURNS, LAST_TURN, OPENED, LEFT = {}, {}, {}, {}, 0, {}, false
  for _, recipient in ipairs(recipients) do
    recipient.queues = {}
    for _, method in ipairs(recipient.methods) do
      if plain[method] == nil then
        local queue = { name = method, key = QUEUE .. method, method = method, limits = NOTHING, fairness = '' }
        plain[method] = not is_paused(method) and open_queue(queue, count, found)
      end
      if plain[method] then
        recipient.queues[#recipient.queues + 1] = plain[method]
        if lanes[method] then open_lanes(recipient, lanes[method], count, found) end
      end
    end
  end
  for method, list in pairs(lanes) do
    for _, queue in ipairs(plain[method] and list or NOTHING) do
      -- No recipient has its labels.
      if not queue.next and redis.call('EXISTS', queue.key) == 1 then LEFT = true end
    end
  end
  for _ in pairs(FAIR_METHODS) do
    read_turns()
    break
  end
end

-- The queue whose first task is next: of a method the one whose turn it is, of several methods the one with the longest
-- queued task.
local function choose(queues)
  local best, best_score, methods
  for _, queue in ipairs(queues) do
    local score = tonumber(queue[queue.next + 1])
    if score and not limited(queue) then
      if FAIR_METHODS[queue.method] then
        methods = methods or {}
        local method = methods[queue.method]
        queue.score = score
        rank(queue, score)
        if not method then
          methods[queue.method] = { queue = queue, score = score }
        else
          method.score = math.min(method.score, score)
          if comes_before(queue, method.queue) then method.queue = queue end
        end
      elseif not best or score < best_score then
        best, best_score = queue, score
      end
    end
  end
  if methods then
    for _, method in pairs(methods) do
      if not best or method.score < best_score then best, best_score = method.queue, method.score end
    end
  end
  return best
end

-- Takes the next task of these queues.
function pop(queues, found)
  while true do
    local queue = choose(queues)
    if not queue then return nil end
    local id = queue[queue.next]
    queue.next = queue.next + 2
    local task = load_listed(queue.key, id, found, true)
    if task and MOVES[task.state].Offered and QUEUE .. lane(task) == queue.key then
      use_limits(queue)
      if FAIR_METHODS[queue.method] then use_turn(queue) end
      return task
    end
    if task then
      WRITES[#WRITES + 1] = { 'ZREM', queue.key, id }
      if MOVES[task.state].Offered then
        -- An older version, which knows no lanes, queued it.
        WRITES[#WRITES + 1] = { 'ZADD', QUEUE .. lane(task), whole(score(task)), id }
        open_lane(lane(task))
      end
    end
  end
end

-- Writes what the offer changed. Returns the time (ms) after which limits may admit tasks that are left in lanes: 0 if that
-- depends on agents, -1 if none are left.
function write_lanes()
  for key, limit in pairs(LIMIT_STATES) do
    if limit.changed then WRITES[#WRITES + 1] = { 'HSET', RATES, key, whole(limit.due) } end
  end
  for key, time in pairs(NEW_TURNS) do WRITES[#WRITES + 1] = { 'HSET', TURNS, key, whole(time) } end
  local again = LEFT and 0 or -1
  for _, queue in ipairs(OPENED) do
    local wait = queue[queue.next] and (limited(queue) or 0)
    if wait and (again < 0 or wait > 0 and (again == 0 or wait < again)) then again = wait end
  end
  return again
end
end
