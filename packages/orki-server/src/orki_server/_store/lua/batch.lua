-- Base of all operations: the clock, the tasks of the batch, and the writes, which follow all checks.
--
-- The constants above are generated from Python. KEYS[1] is the prefix of the shard's keys. ARGV[1] names the caller;
-- events.lua describes the other keys and ARGV[2]. The rest of ARGV is a list of operations: name, number of arguments,
-- arguments. Each operation returns a flat array.
--
-- An operation only reads and decides: it changes tables of this script. When it has ended without an error, `check`
-- makes sure that its writes cannot fail. `flush` sends the writes of several operations together: one for each task,
-- and one for each of the shard's own keys. So an operation that fails leaves nothing behind.
--
-- Lua's numbers are exact up to 2^53; fences exceed that and stay strings.

local OPS = {}
local CALLER = ARGV[1]

local function damaged(what) error({ err = 'DAMAGED ' .. what }) end

local function is_damage(reply)
  local text = type(reply) == 'table' and reply.err or tostring(reply)
  return string.find(text, 'DAMAGED', 1, true) ~= nil or string.find(text, 'WRONGTYPE', 1, true) ~= nil
end

local TYPES = {}

-- Fails if a key has another type than the script needs.
local function typed(key, kind)
  if not TYPES[key] then TYPES[key] = redis.call('TYPE', key).ok end
  if TYPES[key] == 'none' then TYPES[key] = kind end
  if TYPES[key] ~= kind then damaged('key ' .. key .. ' is no ' .. kind) end
end

-- --- the clock ---
--
-- Timers are judged by the shard's clock. It advances with the server's clock while orchestrators send batches: by at most
-- MAX_STEP from one batch to the next, and not at all when the server's clock steps back. A longer step is a gap, in which
-- no orchestrator could hear an agent.

local WALL_US, WALL_TEXT, CLOCK_US, NOW, ABSENT, NEW_CALLER, HAS_STARTS, PAUSED, HAS_LANES
local HOSTS, STORED = {}, {}

-- -> time of the last batch of an orchestrator, for how long it has been absent in all, since when it is there, and the
-- gaps that it knows (ms)
local function host_of(name)
  if not HOSTS[name] then
    local last, absent, since, gaps = string.match(STORED['host:' .. name] or '', '^(%d+) (%d+) (%d+) (%d+)$')
    HOSTS[name] = { last = tonumber(last) or 0, absent = tonumber(absent) or 0, since = tonumber(since) or 0,
      gaps = tonumber(gaps) or 0 }
  end
  return HOSTS[name]
end

local function read_clock()
  local time = redis.call('TIME')
  WALL_US = time[1] * 1000000 + time[2]
  WALL_TEXT = whole(WALL_US)
  local stored = redis.call('HGETALL', CLOCK)
  for at = 1, #stored, 2 do STORED[stored[at]] = stored[at + 1] end
  local wall, clock = tonumber(STORED.wall_us or ''), tonumber(STORED.clock_us or '')
  local gaps = tonumber(STORED.gaps_ms or '') or 0
  HAS_STARTS, PAUSED, HAS_LANES = STORED.starts, STORED.paused, STORED.lanes
  EVENTS.open(WALL_TEXT, STORED.producer, STORED.tasks, STORED.audit)
  if not wall or not clock then wall, clock = WALL_US, WALL_US end
  local passed = WALL_US - wall
  if passed < 0 or passed > MAX_STEP * 1000 then
    gaps = gaps + GRACE
    passed = passed < 0 and 0 or MAX_STEP * 1000
  end
  CLOCK_US = clock + passed
  NOW = math.floor(CLOCK_US / 1000)
  local host = host_of(CALLER)
  NEW_CALLER = host.last == 0
  local is_back = host.last > 0 and NOW - host.last > MAX_STEP
  if is_back then host.absent = host.absent + NOW - host.last + GRACE end
  if is_back or gaps ~= host.gaps then host.since = NOW end
  host.last, host.gaps = NOW, gaps
  ABSENT = { gaps = gaps, own = host.absent + gaps }
end

-- Milliseconds in which the orchestrator that serves an attempt could not hear the agent, since the store began.
local function absence(host) return host_of(host).absent + ABSENT.gaps end

local OTHERS

-- Whether another orchestrator sent a batch to this shard lately.
local function has_others()
  if OTHERS == nil then
    OTHERS = false
    for field in pairs(STORED) do
      local name = string.match(field, '^host:(.*)$')
      if name and name ~= CALLER and NOW - host_of(name).last <= 3 * MAX_STEP then OTHERS = true end
    end
  end
  return OTHERS
end

-- Forgets orchestrators that were not heard of for an hour.
local function forget_hosts()
  for field in pairs(STORED) do
    local name = string.match(field, '^host:(.*)$')
    if name and NOW - host_of(name).last > 3600000 then redis.call('HDEL', CLOCK, field) end
  end
end

local function write_clock()
  if NEW_CALLER then forget_hosts() end
  local host = host_of(CALLER)
  local command = { 'HSET', CLOCK, 'wall_us', whole(WALL_US), 'clock_us', whole(CLOCK_US), 'gaps_ms', whole(ABSENT.gaps),
    'host:' .. CALLER, table.concat({ whole(host.last), whole(host.absent), whole(host.since), whole(host.gaps) }, ' ') }
  if EVENTS.added > 0 then
    for _, value in ipairs({ 'producer', EVENTS.producer, 'tasks', whole(EVENTS.tasks), 'audit', whole(EVENTS.audit) }) do
      command[#command + 1] = value
    end
  end
  redis.call(unpack(command))
end

-- --- memory ---

local FULL

-- Whether the server is out of memory. Redis refuses commands that need memory only before a script's first write, so
-- everything that frees memory in the end goes on after this.
local function is_full()
  if FULL == nil then
    local reply = redis.pcall('SETRANGE', PROBE, 0, '')
    FULL = type(reply) == 'table' and reply.err ~= nil
    if FULL and not string.find(reply.err, 'OOM', 1, true) then error(reply) end
    if FULL then redis.call('DEL', PROBE) end
  end
  return FULL
end

local function refuse_if_full()
  if is_full() then error({ err = "OOM command not allowed when used memory > 'maxmemory'" }) end
end

-- --- tasks ---

local TASKS, TOUCHED, WRITES, RECORDS = {}, {}, {}, {}

local OPTIONS = {}

-- Timeouts and waits are in milliseconds; 0 as `stall` or `total` means no limit.
local function options(task)
  local o = OPTIONS[task.options]
  if not o then
    o = {}
    o.heartbeat, o.attempt, o.stall, o.total, o.attempts, o.initial, o.maximum, o.multiplier, o.grace = string.match(
      task.options, '^(%d+),(%d+),(%d+),(%d+),(%d+),(%d+),(%d+),([%d.]+),(%d+)$')
    if not o.grace then damaged('options of task ' .. task.id) end
    for name, value in pairs(o) do o[name] = tonumber(value) end
    OPTIONS[task.options] = o
  end
  return o
end

-- Sets a task to what is stored, or to what the last successful operation of this batch made of it.
local function restore(task)
  local shown, fields, dirty, place = task.shown, task.staged_fields, task.dirty, task.placement
  local more_text = task.more_text
  for name, value in pairs(parse(task.id, task.text, task.spec)) do task[name] = value end
  task.shown, task.fields, task.staged_fields, task.dirty = shown, fields, fields, dirty
  task.placement = place -- It never changes.
  task.more_text = more_text
end

-- Sets a field that transitions do not read.
local function set(task, name, value)
  local fields = {}
  for other, text in pairs(task.fields) do fields[other] = text end
  fields[name] = value
  task.fields = fields
end

-- The named values that few tasks have. They are not packed by position, so that other versions read them.
local function more(task)
  local text, values = task.fields.more or task.more_text, {}
  for name, value in string.gmatch(text, '([^=\31]+)=([^\31]*)') do values[name] = value end
  return values
end

-- Changes some of these values; an empty one is removed.
local function remember(task, changes)
  local values, texts = more(task), {}
  for name, value in pairs(changes) do values[name] = string.gsub(value, '[\30\31]', ' ') end
  for name, value in pairs(values) do
    if value ~= '' then texts[#texts + 1] = name .. '=' .. value end
  end
  table.sort(texts)
  set(task, 'more', table.concat(texts, '\31'))
end

-- What the shard's own keys hold about the task.
local function shown(task)
  return { delayed = is_delayed(task), queued_us = task.queued_us, timer = task.timer, state = task.state }
end

local function touch(task)
  if not task.touched then TOUCHED[#TOUCHED + 1], task.touched = task, true end
end

local function load(id, with_request)
  local task = TASKS[id]
  if task then return task.state ~= 'ABSENT' and task or nil end
  local values = with_request and redis.call('HMGET', TASK .. id, 'state', 'spec', 'placement', 'more', 'request')
    or redis.call('HMGET', TASK .. id, 'state', 'spec', 'placement', 'more')
  if not values[1] and not values[2] then return nil end
  if not values[1] or not values[2] then damaged('task ' .. id) end
  task = parse(id, values[1], values[2])
  if not task or not MOVES[task.state] then damaged('record of task ' .. id) end
  options(task)
  task.placement, task.more_text, task.request = values[3], values[4] or '', values[5]
  task.shown = shown(task)
  TASKS[id] = task
  return task
end

-- A new task. It is ABSENT until its first move.
local function create(id)
  local task = parse(id, NEW_STATE, NEW_SPEC)
  task.shown = shown(task)
  TASKS[id] = task
  return task
end

-- The only place that assigns the state. An event that the table does not list fails.
local function move(task, event)
  local following = MOVES[task.state][event]
  if not following then error({ err = 'ERR ' .. event .. ' is illegal in state ' .. task.state }) end
  touch(task)
  task.state = following
end

local ENDED = { SUCCEEDED = true, FAILED = true, CANCELLED = true, ABSENT = true }

-- Takes the task's next timer. With `lazily`, a timer that only moves away is left to the sweep.
local function sort(task, lazily)
  local first
  for _, timer in ipairs(TIMERS) do
    local due = task[timer[1]]
    if due > 0 and (not first or due < first) then first = due end
  end
  if not lazily or task.timer == 0 or not first or first < task.timer then task.timer = first or 0 end
end

-- --- checks ---

local OPEN_COUNTS = {}

local OPEN_NAMES = {}

local function open_names(task)
  local key = task.method .. task.contract
  if not OPEN_NAMES[key] then
    local service = string.match(task.method, '^[^/]*')
    OPEN_NAMES[key] = task.contract == '' and { service } or { service, service .. '@' .. task.contract }
  end
  return OPEN_NAMES[key]
end

local function open_count(name)
  if not OPEN_COUNTS[name] then
    OPEN_COUNTS[name] = { number = tonumber(redis.call('HGET', OPEN, name) or '0') or 0 }
  end
  return OPEN_COUNTS[name]
end

-- Checks all that the writes of a task need.
local function check(task)
  local before = task.shown
  task.next_text = write_state(task)
  if task.timer ~= before.timer then typed(NEXT_TIMERS, 'zset') end
  if task.state ~= before.state and (task.state == 'QUEUED' or before.state == 'QUEUED')
    or task.queued_us ~= before.queued_us then typed(QUEUE .. lane(task), 'zset') end
  if task.placement then
    typed(LANES, 'hash')
    for _, key in ipairs(limits_of(task)) do typed(HOLDERS .. key, 'set') end
  end
  if is_delayed(task) ~= before.delayed then typed(STARTS, 'zset') end
  if before.state == 'ABSENT' or task.state == 'ABSENT' then typed(INDEX, 'zset') end
  if ENDED[task.state] ~= ENDED[before.state] then
    typed(OPEN, 'hash')
    for _, name in ipairs(open_names(task)) do open_count(name) end
  end
end

local function check_all(writes, records)
  for _, task in ipairs(TOUCHED) do check(task) end
  if #RECORDS > records then typed(OUTBOX, 'stream') end
  if TOUCHED[1] or #RECORDS > records or #WRITES > writes then is_full() end
end

-- Runs a part of the batch. If it fails, nothing of it is left.
local function attempt(action, arguments)
  local writes, records = #WRITES, #RECORDS
  TOUCHED = {}
  local done, reply = pcall(action, arguments)
  if done then
    local checked, problem = pcall(check_all, writes, records)
    if not checked then done, reply = false, problem end
  end
  for _, task in ipairs(TOUCHED) do
    task.touched = false
    if done then
      task.text, task.dirty, task.staged_fields = task.next_text, true, task.fields
    elseif task.shown.state == 'ABSENT' and not task.dirty then
      TASKS[task.id] = nil
    else
      restore(task)
    end
  end
  if not done then
    for at = #WRITES, writes + 1, -1 do WRITES[at] = nil end
    for at = #RECORDS, records + 1, -1 do RECORDS[at] = nil end
  end
  return done, reply
end

-- --- writes ---

-- Sends one write. All checks have passed, so a write does not fail; one that does is repeated once and does not keep
-- the others back.
local PROBLEM

local function write(command)
  local reply = redis.pcall(unpack(command))
  if type(reply) == 'table' and reply.err then reply = redis.pcall(unpack(command)) end
  if type(reply) == 'table' and reply.err then PROBLEM = reply end
end

local function add(lists, key, ...)
  local list = lists[key]
  if not list then list = {} lists[key] = list end
  for _, value in ipairs({ ... }) do list[#list + 1] = value end
end

-- Sends a command with the collected arguments, a few thousand at a time.
local function write_list(name, key, list)
  for at = 1, #list, 4000 do write({ name, key, unpack(list, at, math.min(at + 3999, #list)) }) end
end

-- What other orchestrators are told: numbers of newly queued tasks by method, orchestrators with new mail, changed tasks,
-- and whether a pause has ended.
local QUEUED, MAILED, CHANGED, RESUMED = {}, {}, {}, false

-- The first timer that the batch has set, by the shard's clock (ms).
local NEXT_DUE

local function set_due(due)
  if not NEXT_DUE or due < NEXT_DUE then NEXT_DUE = due end
end

local function open_lane(name)
  WRITES[#WRITES + 1] = { 'HSETNX', LANES, name, '' }
  if not HAS_LANES then HAS_LANES, WRITES[#WRITES + 1] = '1', { 'HSET', CLOCK, 'lanes', '1' } end
end

-- Collects what changes in the shard's own keys.
local function compare(task, before, added, removed)
  if task.timer ~= before.timer then
    if task.timer > 0 then
      add(added, NEXT_TIMERS, whole(task.timer), task.id)
      set_due(task.timer)
    else
      add(removed, NEXT_TIMERS, task.id)
    end
  end
  local is_queued, was_queued = task.state == 'QUEUED', before.state == 'QUEUED'
  if is_queued and (not was_queued or task.queued_us ~= before.queued_us) then
    add(added, QUEUE .. lane(task), whole(score(task)), task.id)
    if lane(task) ~= task.method then open_lane(lane(task)) end
    QUEUED[task.method] = (QUEUED[task.method] or 0) + 1
  elseif was_queued and not is_queued then
    add(removed, QUEUE .. lane(task), task.id)
  end
  if is_delayed(task) ~= before.delayed then
    if before.delayed then
      add(removed, STARTS, task.id)
    else
      add(added, STARTS, whole(math.ceil(placement(task).start_us / 1000)), task.id)
      set_due(NOW + math.ceil((placement(task).start_us - WALL_US) / 1000))
      if not HAS_STARTS then HAS_STARTS, WRITES[#WRITES + 1] = '1', { 'HSET', CLOCK, 'starts', '1' } end
    end
  end
  if before.state == 'ABSENT' and task.state ~= 'ABSENT' then
    add(added, INDEX, whole(task.submitted_us), task.id)
  elseif task.state == 'ABSENT' and before.state ~= 'ABSENT' then
    add(removed, INDEX, task.id)
  end
  if task.placement and HELD[task.state] ~= HELD[before.state] then
    for _, key in ipairs(limits_of(task)) do
      WRITES[#WRITES + 1] = { HELD[task.state] and 'SADD' or 'SREM', HOLDERS .. key, task.id }
    end
    -- Another task may take the place of this one.
    local ends = HELD[before.state] and limits_of(task)[1]
    if ends then QUEUED[task.method] = (QUEUED[task.method] or 0) + 1 end
  end
  local change = (ENDED[before.state] and 1 or 0) - (ENDED[task.state] and 1 or 0)
  if change ~= 0 then
    for _, name in ipairs(open_names(task)) do
      local count = open_count(name)
      count.number, count.changed = math.max(0, count.number + change), true
    end
  end
end

local function write_task(task)
  if task.state == 'ABSENT' then return end
  task.more_text = task.staged_fields.more or task.more_text
  local command = { 'HSET', TASK .. task.id, 'state', task.text }
  for name, value in pairs(task.staged_fields) do
    command[#command + 1], command[#command + 2] = name, value
  end
  write(command)
end

local function write_counts()
  for name, count in pairs(OPEN_COUNTS) do
    if count.changed then
      write(count.number > 0 and { 'HSET', OPEN, name, whole(count.number) } or { 'HDEL', OPEN, name })
      count.changed = nil
    end
  end
end

-- Writes the records as events, or to the outbox, where one entry holds several of them.
local function write_records()
  local at = 1
  while RECORDS[at] and EVENTS.add(RECORDS[at]) do at = at + 1 end
  for first = at, #RECORDS, 128 do
    local entry = { 'XADD', OUTBOX, '*' }
    for each = first, math.min(first + 127, #RECORDS) do
      entry[#entry + 1], entry[#entry + 2] = 'r', table.concat(RECORDS[each], '\31')
    end
    write(entry)
  end
  RECORDS = {}
end

-- Writes the effects of all operations so far.
local function flush()
  local added, removed = {}, {}
  for _, task in pairs(TASKS) do
    if task.dirty then
      write_task(task)
      compare(task, task.shown, added, removed)
      CHANGED[#CHANGED + 1] = (ENDED[task.state] and '!' or '') .. task.id
      task.dirty, task.staged_fields, task.fields, task.shown = false, NOTHING, NOTHING, shown(task)
    end
  end
  for key, list in pairs(removed) do write_list('ZREM', key, list) end
  for key, list in pairs(added) do write_list('ZADD', key, list) end
  write_counts()
  for at = 1, #WRITES do write(WRITES[at]) end
  WRITES = {}
  if RECORDS[1] then write_records() end
end
