-- What orchestrators tell each other: mail for one of them, and announcements of changes for all.
--
-- Mail is in a mailbox on the shard of its task. An announcement only says that there is something to read, so it may
-- get lost: orchestrators also look from time to time.

-- --- mail ---

-- Whether an orchestrator sent a batch to this shard lately.
local function is_live(host) return host ~= '' and NOW - host_of(host).last <= 3 * MAX_STEP end

-- Puts mail into the mailbox of an orchestrator; `values` are those of MAIL_FIELDS.
local function post(host, values)
  local key = MAIL .. host
  local kind = redis.call('TYPE', key).ok
  if kind ~= 'none' and kind ~= 'stream' then WRITES[#WRITES + 1] = { 'DEL', key } end
  local entry = { 'XADD', key, 'MAXLEN', '~', '10000', '*' }
  for at, name in ipairs(MAIL_FIELDS) do entry[2 * at + 5], entry[2 * at + 6] = name, values[at] end
  WRITES[#WRITES + 1] = entry
  -- An orchestrator that is gone reads no mail.
  WRITES[#WRITES + 1] = { 'PEXPIRE', key, '60000' }
  MAILED[host] = true
end

-- Tells the orchestrator of an attempt about its cancel, if it is another one.
local function post_cancel(task, message)
  if task.host == CALLER or not is_live(task.host) then return end
  post(task.host, {
    'cancel', task.id, whole(task.attempt), task.fence, task.agent_id, task.method, CALLER, whole(options(task).grace),
    '0', message, '',
  })
end

-- orchestrator, "1" if the mail may be refused, then the values of MAIL_FIELDS -> posted | absent | full
OPS.post = function(a)
  if not is_live(a[1]) then return { 'absent' } end
  if a[2] == '1' then
    refuse_if_full()
    local done, length = pcall(redis.call, 'XLEN', MAIL .. a[1])
    if done and length >= 1000 then return { 'full' } end
  end
  post(a[1], { unpack(a, 3) })
  return { 'posted' }
end

-- orchestrator -> "1" if it was heard of lately
OPS.is_live = function(a) return { is_live(a[1]) and '1' or '0' } end

-- maximum number -> "1" if there may be more, then the values of MAIL_FIELDS of each; they leave the mailbox
OPS.mail = function(a)
  flush()
  local key = MAIL .. CALLER
  local done, entries = pcall(redis.call, 'XRANGE', key, '-', '+', 'COUNT', a[1])
  if not done and not is_damage(entries) then error(entries, 0) end
  local more = done and #entries == tonumber(a[1])
  local reply, ids = { more and '1' or '0' }, {}
  for number, entry in ipairs(done and entries or NOTHING) do
    ids[number] = entry[1]
    for at = 1, #MAIL_FIELDS do reply[#reply + 1] = entry[2][2 * at] or '' end
  end
  if more then
    WRITES[#WRITES + 1] = { 'XDEL', key, unpack(ids) }
  elseif ids[1] or not done then
    WRITES[#WRITES + 1] = { 'DEL', key }
  end
  return reply
end

-- --- queues ---

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

-- --- what a task waits for ---

-- id -> nothing for an unknown task; else state, "1" if its method is paused, then the end of its wait, its offer and its
-- lease (us; 0 for none)
OPS.waits = function(a)
  local task = load(a[1])
  if not task then return {} end
  local reply = { task.state, is_paused(task.method) and '1' or '0' }
  for _, due in ipairs({ task.retry_due, task.offer_due, task.lease_due }) do
    reply[#reply + 1] = due > 0 and whole(WALL_US + (due - NOW) * 1000) or '0'
  end
  return reply
end

-- --- announcements ---

-- Publishes what the batch has changed, if there are other orchestrators: the caller and the shard, then lines `q` with
-- method and number of queued tasks, `m` with an orchestrator that has mail, `c` with changed tasks (`!` marks those that
-- have ended), and `r` if a pause has ended.
local function announce()
  if not has_others() then return end
  local lines = { CALLER .. ' ' .. string.match(KEYS[1], '{o(%d+)}') }
  for method, count in pairs(QUEUED) do lines[#lines + 1] = 'q ' .. method .. ' ' .. whole(count) end
  for host in pairs(MAILED) do lines[#lines + 1] = 'm ' .. host end
  if CHANGED[1] then lines[#lines + 1] = 'c ' .. table.concat(CHANGED, ' ') end
  if RESUMED then lines[#lines + 1] = 'r' end
  -- A user without the permission to publish has to wait for the next look.
  if lines[2] then redis.pcall('PUBLISH', CHANNEL, table.concat(lines, '\n')) end
end
