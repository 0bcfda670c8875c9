-- Budgets of tokens, cost and calls, for a task and all tasks below it.
--
-- The topmost task of a tree that has a budget is the anchor. All budgets of the tree and what is charged to them are one
-- hash on the anchor's shard, so that a charge counts for each of them or for none. A task knows the budgets that it is
-- charged to, the anchor first.

-- A block of its own: Lua allows 200 local variables at a time.
local set_lineage, owns_budget

do
local MAX_FIELDS = 100000

local function amounts(text, key)
  if not text then return { 0, 0, 0 } end
  local tokens, cost, calls = string.match(text, '^(%d+),(%d+),(%d+)$')
  if not tokens then damaged('key ' .. key) end
  return { tonumber(tokens), tonumber(cost), tonumber(calls) }
end

local function packed(values) return whole(values[1]) .. ',' .. whole(values[2]) .. ',' .. whole(values[3]) end

local function is_used_up(limit, used)
  for at = 1, 3 do
    if limit[at] > 0 and used[at] >= limit[at] then return true end
  end
  return false
end

-- Sets where a new task stands in its tree: the task whose handler submitted it, the root, the budgets that the parent is
-- charged to, and a budget of its own ("" for none). That of another anchor was opened before.
function set_lineage(task, parent, root, accounts, own)
  if parent == '' and own == '' then return end
  if own ~= '' and accounts == '' then
    accounts = task.id
    typed(BUDGETS .. task.id, 'hash')
    WRITES[#WRITES + 1] = { 'HSET', BUDGETS .. task.id, 'limit:' .. task.id, own }
  elseif own ~= '' then
    accounts = accounts .. ',' .. task.id
  end
  remember(task, { parent = parent, root = root, accounts = accounts })
end

function owns_budget(task) return string.match(more(task).accounts or '', '^[^,]*') == task.id end

-- id, fence of its attempt ("" for any) -> nothing for an unknown task; `stale` (no such attempt runs) or `found`, root,
-- budgets that it is charged to
OPS.lineage = function(a)
  local task = load(a[1])
  if not task then return {} end
  local values = more(task)
  local is_current = a[2] == '' or task.fence == a[2] and HELD[task.state]
  return { is_current and 'found' or 'stale', values.root or task.id, values.accounts or '' }
end

-- anchor, task, its budget -> opened | gone (the anchor's budget was removed with it) | full
OPS.open_budget = function(a)
  local key = BUDGETS .. a[1]
  typed(key, 'hash')
  flush()
  local fields = redis.call('HLEN', key)
  if fields == 0 or fields >= MAX_FIELDS then return { fields == 0 and 'gone' or 'full' } end
  refuse_if_full()
  WRITES[#WRITES + 1] = { 'HSETNX', key, 'limit:' .. a[2], a[3] }
  return { 'opened' }
end

-- Usage of an attempt in all; only what exceeds its earlier reports is charged.
-- anchor, task, attempt, tokens, cost, calls, "1" if the task waits while a budget is used up, budgets
-- -> for each budget that exists: its task, the budget, what is used
OPS.charge = function(a)
  local key = BUDGETS .. a[1]
  typed(key, 'hash')
  flush()
  local names = { 'charge:' .. a[2] .. ':' .. a[3] }
  for at = 8, #a do names[#names + 1], names[#names + 2] = 'limit:' .. a[at], 'used:' .. a[at] end
  local values = redis.call('HMGET', key, unpack(names))
  local before, total, has_grown = amounts(values[1], key), {}, false
  for at = 1, 3 do
    total[at] = math.max(before[at], tonumber(a[3 + at]))
    has_grown = has_grown or total[at] > before[at]
  end
  local reply, command, waits = {}, { 'HSET', key, names[1], packed(total) }, false
  for at = 8, #a do
    local limit = values[2 * (at - 7)]
    if limit then
      local used = amounts(values[2 * (at - 7) + 1], key)
      for number = 1, 3 do used[number] = used[number] + total[number] - before[number] end
      waits = waits or a[7] == '1' and is_used_up(amounts(limit, key), used)
      command[#command + 1], command[#command + 2] = 'used:' .. a[at], packed(used)
      reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = a[at], limit, packed(used)
    end
  end
  if has_grown and reply[1] then WRITES[#WRITES + 1] = command end
  if waits then WRITES[#WRITES + 1] = { 'HSET', key, 'wait:' .. a[2], a[3] .. ' ' .. table.concat(a, ',', 8) } end
  return reply
end
OPS.balance = OPS.charge

-- anchor, task, new amounts (0 keeps one) -> unknown | lower; or raised, the budget, what is used
OPS.raise_budget = function(a)
  local key = BUDGETS .. a[1]
  typed(key, 'hash')
  flush()
  local values = redis.call('HMGET', key, 'limit:' .. a[2], 'used:' .. a[2])
  if not values[1] then return { 'unknown' } end
  local limit = amounts(values[1], key)
  for at = 1, 3 do
    local amount = tonumber(a[2 + at])
    if amount > 0 and (limit[at] == 0 or amount < limit[at]) then return { 'lower' } end
    limit[at] = math.max(limit[at], amount)
  end
  typed(RAISED, 'zset')
  WRITES[#WRITES + 1] = { 'HSET', key, 'limit:' .. a[2], packed(limit) }
  WRITES[#WRITES + 1] = { 'ZADD', RAISED, whole(WALL_US), a[1] }
  WRITES[#WRITES + 1] = { 'HSET', CLOCK, 'raised', '1' }
  set_due(NOW) -- A sweep looks for them.
  return { 'raised', packed(limit), packed(amounts(values[2], key)) }
end

-- -> for each task that waits for a budget which is no longer used up: anchor, task, attempt
local function add_admitted(reply, anchor)
  local values, key = {}, BUDGETS .. anchor
  local rows = redis.call('HGETALL', key)
  for at = 1, #rows, 2 do values[rows[at]] = rows[at + 1] end
  for name, value in pairs(values) do
    local id = string.match(name, '^wait:(.*)$')
    local number, accounts = string.match(value, '^(%d+) (.*)$')
    local admitted = id ~= nil
    for account in string.gmatch(id and accounts or '', '[^,]+') do
      local limit = values['limit:' .. account]
      if limit and is_used_up(amounts(limit, key), amounts(values['used:' .. account], key)) then admitted = false end
    end
    if admitted then reply[#reply + 1], reply[#reply + 2], reply[#reply + 3] = anchor, id, number end
  end
end

OPS.admitted = function()
  typed(RAISED, 'zset')
  flush()
  local reply, left = {}, false
  local anchors = redis.call('ZRANGE', RAISED, '0', '9')
  for _, anchor in ipairs(anchors) do
    local before = #reply
    local done, problem = pcall(add_admitted, reply, anchor)
    if not done and not is_damage(problem) then error(problem, 0) end
    if #reply == before then WRITES[#WRITES + 1] = { 'ZREM', RAISED, anchor } else left = true end
  end
  if not left and #anchors < 10 then WRITES[#WRITES + 1] = { 'HDEL', CLOCK, 'raised' } end
  return reply
end

-- anchor, task, attempt: the task no longer waits
OPS.admit = function(a)
  local key = BUDGETS .. a[1]
  typed(key, 'hash')
  flush()
  local value = redis.call('HGET', key, 'wait:' .. a[2])
  if value and string.match(value, '^%d+') == a[3] then WRITES[#WRITES + 1] = { 'HDEL', key, 'wait:' .. a[2] } end
  return {}
end
end
